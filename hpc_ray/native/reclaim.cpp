#include "reclaim.h"

#include <string.h>

#include <algorithm>
#include <memory>
#include <unordered_map>

#include "lane.h"
#include "ring.h"
#include "store.h"

namespace hpc {

namespace {

constexpr u32 kSlotsPerTurn = 4096;  // others get the mutex in between

bool still_dead(Segment& segment, u64 address) {
    return segment.lane(address_index(address)).word.load() == lane_word(kLaneDead, address_incarnation(address));
}

void alert(Segment& segment, u32 target, u32 about) {
    LaneEntry& entry = segment.lane(target);
    entry.ready[about / 64].fetch_or(u64(1) << (about % 64));
    lane_wake_all(entry);  // LANE-5
}

void reclaim_rings(Segment& s, u32 dead, std::unordered_map<u64, u64>& inherited) {
    std::vector<u64> handles;
    for (u32 other = 0, high = s.lanes_high(); other < high; other++) {
        if (u32 found = s.directory(dead, other).load()) {  // into the dead lane
            if (other != dead && lane_state(s.lane(other).word.load()) == kLaneOpen) {
                ring_discard(s, found - 1);
                alert(s, other, dead);  // the producer gives the ring back
            } else {
                ring_release(s, dead, other);
            }
        }
        if (other == dead) continue;
        if (u32 found = s.directory(other, dead).load()) {  // out of the dead lane
            RingControl& ring = s.ring(found - 1);
            u64 word = s.lane(other).word.load();
            bool open = lane_state(word) == kLaneOpen;
            bool awaited = lane_state(word) == kLaneFree && other < kWellKnownLanes && ring.head.load() != ring.tail.load();
            if (!open && !awaited) {
                ring_release(s, other, dead);
                continue;
            }
            handles.clear();
            ring_objects(s, found - 1, handles);
            for (u64 handle : handles)
                inherited[handle] = make_address(s.node(), other, open ? lane_incarnation(word) : 0);
            ring.closed.store(1);
            if (open) alert(s, other, dead);
        }
    }
}

}  // namespace

std::vector<Unclaimed> reclaim(Segment& s, u64 address) {
    const u32 dead = address_index(address);
    if (address_node(address) != s.node() || dead >= s.header().max_lanes)
        throw std::invalid_argument("not an address of this node");
    if (s.lane(dead).word.load() == lane_word(kLaneOpen, address_incarnation(address)))
        throw std::invalid_argument("the lane is open: mark it dead first");
    std::vector<Unclaimed> unclaimed;
    std::unordered_map<u64, u64> inherited;  // arena objects of frames that their receivers will still get
    auto lock = std::make_unique<Segment::Lock>(s);
    if (!still_dead(s, address)) return {};
    reclaim_rings(s, dead, inherited);
    const u64 bit = u64(1) << (dead % 64);
    for (u32 i = 0; i < s.slots_high(); i++) {
        if (i % kSlotsPerTurn == kSlotsPerTurn - 1) {
            lock.reset();
            lock = std::make_unique<Segment::Lock>(s);
            if (!still_dead(s, address)) return {};  // another one was faster, and has the list
        }
        Slot& slot = s.slot(i);
        if (slot.pins[dead / 64].load() & bit) slot.pins[dead / 64].fetch_and(~bit);
        u64 word = slot.word.load();
        if (slot_state(word) == kSlotCreating && slot.creator.load() == address) {
            store_free_locked(s, i, true);
        } else if (slot_state(word) == kSlotSealed || slot_state(word) == kSlotSpilled) {
            u64 handle = make_handle(i, slot_generation(word));
            u64 owner = slot.owner.load();
            if (owner == address) {
                auto heir = inherited.find(handle);
                if (heir != inherited.end())
                    slot.owner.store(heir->second);  // RECLAIM-3
                else
                    store_delete_locked(s, handle);
            } else if (slot.creator.load() == address && slot.claimed.load() == 0 && slot.kind.load() == kKindObject) {
                Unclaimed u;
                u64 id[4];
                for (int k = 0; k < 4; k++) id[k] = slot.id[k].load();
                memcpy(u.id, id, kObjectIdBytes);
                u.handle = handle;
                u.owner = owner;
                bool here = address_incarnation(owner) != 0 && address_node(owner) == s.node();
                if (!here || s.alive(owner))
                    unclaimed.push_back(u);
                else
                    store_delete_locked(s, handle);
            }
        } else if (slot_state(word) == kSlotDoomed) {
            store_free_locked(s, i, false);
        }
    }
    s.lane(dead).waiter.store(0);
    s.lane(dead).word.store(lane_word(kLaneFree, address_incarnation(address)));  // RECLAIM-2
    return unclaimed;
}

}  // namespace hpc
