#include "store.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <thread>

#include "heap.h"
#include "lane.h"
#include "process.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace hpc {

namespace {

std::string full_text(u64 asked, u64 largest, u64 free, u64 capacity) {
    return "the node's object arena is full: " + std::to_string(asked) + " bytes asked, " + std::to_string(largest) +
           " bytes in the largest free block, " + std::to_string(free) + " of " + std::to_string(capacity) +
           " bytes free; drop references or start with a larger object_store_memory";
}

void set_id(Slot& slot, const char* id) {
    u64 words[4] = {};
    memcpy(words, id, kObjectIdBytes);
    for (int i = 0; i < 4; i++) slot.id[i].store(words[i], std::memory_order_relaxed);
}

ObjectRecord record_of(const Slot& slot, u32 index, u64 word) {
    ObjectRecord r;
    r.handle = make_handle(index, slot_generation(word));
    r.size = slot.size.load(std::memory_order_relaxed);
    r.owner = slot.owner.load(std::memory_order_relaxed);
    r.creator = slot.creator.load(std::memory_order_relaxed);
    r.sealed = slot_state(word) == kSlotSealed || slot_state(word) == kSlotSpilled;
    r.on_disk = slot.offset.load(std::memory_order_relaxed) == 0;
    r.claimed = slot.claimed.load(std::memory_order_relaxed) != 0;
    u64 words[4];
    for (int i = 0; i < 4; i++) words[i] = slot.id[i].load(std::memory_order_relaxed);
    memcpy(r.id, words, kObjectIdBytes);
    return r;
}

}  // namespace

// The largest block that an object may have; the caller holds Segment::Lock.
static u64 largest_for_objects(Segment& s) {
    const u64 used = s.header().heap_used.load(), limit = s.header().object_bytes.load();
    if (used + sizeof(Block) >= limit) return 0;
    return std::min(heap_largest_free(s), limit - used - sizeof(Block));
}

ArenaFull::ArenaFull(u64 asked, u64 largest_free, u64 free, u64 capacity)
    : std::runtime_error(full_text(asked, largest_free, free, capacity)),
      asked_bytes(asked),
      largest_free_bytes(largest_free),
      free_bytes(free),
      capacity_bytes(capacity) {}

bool slot_pinned(const Slot& slot) {
    for (const atomic<u64>& word : slot.pins)
        if (word.load() != 0) return true;
    return false;
}

bool store_free_locked(Segment& segment, u32 index, bool force) {
    Slot& slot = segment.slot(index);
    u64 word = slot.word.load();
    const u32 state = slot_state(word);
    const bool ends = state == kSlotDoomed ? !slot_pinned(slot) : force && (state == kSlotCreating || state == kSlotSpilled);
    if (!ends) return false;
    const u64 offset = slot.offset.load();
    slot.word.store(slot_word(kSlotFree, slot_generation(word)));  // LAYOUT-1; killed here: HEAP-2 finds the block
    if (offset != 0) heap_free(segment, heap_position(segment, offset));
    Header& h = segment.header();
    slot.next_free = h.free_slot;
    h.free_slot = index + 1;
    h.slots_used.fetch_sub(1, std::memory_order_relaxed);
    return true;
}

Removed store_delete_locked(Segment& segment, u64 handle) {
    if (handle_slot(handle) >= segment.slots_high()) return Removed::kGone;
    u64 expected = slot_word(kSlotSealed, handle_generation(handle));
    bool deleted = segment.slot(handle_slot(handle))
                       .word.compare_exchange_strong(expected, slot_word(kSlotDoomed, handle_generation(handle)));
    if (!deleted && expected == slot_word(kSlotSpilled, handle_generation(handle))) {
        store_free_locked(segment, handle_slot(handle), true);
        return Removed::kFromDisk;
    }
    if (deleted || slot_state(expected) == kSlotDoomed) store_free_locked(segment, handle_slot(handle), false);
    return deleted ? Removed::kFromArena : Removed::kGone;
}

Store::Store(std::shared_ptr<Segment> segment, u64 address)
    : segment_(std::move(segment)),
      address_(address),
      lane_(address_index(address)),
      pins_(static_cast<u32*>(calloc(segment_->header().max_slots, sizeof(u32))), free),
      populated_(static_cast<atomic<bool>*>(calloc(segment_->bytes() / kPopulated + 1, sizeof(atomic<bool>))), free) {
    if (!pins_) throw std::bad_alloc();
}

Slot* Store::find(u64 handle) {
    u32 index = handle_slot(handle);
    return index < segment_->slots_high() ? &segment_->slot(index) : nullptr;
}

u64 Store::create(const char* id, u64 size, u64 owner, u32 kind) { return create_slot(id, size, owner, kind, true); }

u64 Store::create_on_disk(const char* id, u64 size, u64 owner) {
    return create_slot(id, size, owner, kKindObject, false);
}

u64 Store::create_slot(const char* id, u64 size, u64 owner, u32 kind, bool in_arena) {
    Segment& s = *segment_;
    Header& h = s.header();
    const u64 capacity = kind == kKindObject ? h.object_bytes.load() : h.heap_bytes;
    u64 largest, free;
    {
        Segment::Lock lock(s);
        u32 index = h.free_slot ? h.free_slot - 1 : s.slots_high();
        if (index < h.max_slots) {
            Slot& slot = s.slot(index);
            u32 generation = slot_generation(slot.word.load()) + 1;
            if (generation == 0) generation = 1;
            u64 handle = make_handle(index, generation);
            u64 position = kNoBlock;
            const bool fits = kind == kKindFrame || (size <= capacity && h.heap_used.load() + sizeof(Block) + size <= capacity);  // STORE-6
            if (in_arena && fits) position = heap_allocate(s, size, handle);
            if (position != kNoBlock || !in_arena) {
                if (h.free_slot)
                    h.free_slot = slot.next_free;
                else
                    h.slots_high.store(index + 1);
                slot.offset.store(in_arena ? heap_data(s, position) : 0, std::memory_order_relaxed);
                slot.size.store(size, std::memory_order_relaxed);
                slot.owner.store(owner, std::memory_order_relaxed);
                slot.creator.store(address_, std::memory_order_relaxed);
                slot.claimed.store(0, std::memory_order_relaxed);
                slot.kind.store(kind, std::memory_order_relaxed);
                slot.used_at.store(u64(monotonic_ns()), std::memory_order_relaxed);
                set_id(slot, id);
                slot.word.store(slot_word(kSlotCreating, generation));  // LAYOUT-1
                h.slots_used.fetch_add(1, std::memory_order_relaxed);
                return handle;
            }
        }
        largest = index < h.max_slots ? largest_for_objects(s) : 0;  // no slot left counts as full as well
        free = capacity - std::min(capacity, h.heap_used.load());
    }
    throw ArenaFull(size, largest, free, capacity);
}

char* Store::write_address(u64 handle, u64& size) {
    Slot* slot = find(handle);
    const bool may_write = slot && (slot->creator.load() == address_ || address_index(address_) == kLinkLane);
    if (!may_write || slot->word.load() != slot_word(kSlotCreating, handle_generation(handle)))
        throw std::invalid_argument("only the creator may write, and only before seal: no object being created has "
                                    "this handle");
    size = slot->size.load();
    if (slot->offset.load() == 0) throw std::invalid_argument("the bytes of this object go to a file, not to the arena");
    return segment_->base() + slot->offset.load();
}

bool Store::is_populated(const char* first, const char* last) const {
    const atomic<bool>* known = populated_.get();
    return std::all_of(known + part_of(first), known + part_of(last - 1) + 1,
                       [](const atomic<bool>& part) { return part.load(std::memory_order_relaxed); });
}

void Store::set_populated(const char* first, const char* last) {
    atomic<bool>* known = populated_.get();
    std::for_each(known + part_of(first), known + part_of(last - 1) + 1,
                  [](atomic<bool>& part) { part.store(true, std::memory_order_relaxed); });
}

// Maps pages that are about to be written, faster than by faults.
void Store::populate(char* first, char* last) {
    if (is_populated(first, last)) return;
    const u64 begin = part_of(first) * kPopulated, stop = std::min((part_of(last - 1) + 1) * kPopulated, segment_->bytes());
    if (madvise(segment_->base() + begin, stop - begin, MADV_POPULATE_WRITE) == 0) set_populated(first, last);
}

// The same with huge pages, where they lie in memory that is all an object's, which ends at `end`: ten times as fast again, and
// for its readers too. Shared memory seldom gets them by itself; this call (Linux 6.1) does not ask what is configured. It wants to
// find something in each, and has all cores hand over pages that they keep aside, for which it waits when they are busy: so
// it is made for many at once.
void Store::make_huge(char* first, char* last, char* end) {
    constexpr u32 enough = 4;  // failures in a row: the system cannot, or has none left
    if (huge_failures_.load(std::memory_order_relaxed) >= enough) return;
    char* base = segment_->base();
    const u64 begin = round_up(u64(first - base), kHugePage);
    const u64 stop = std::min(round_up(u64(last - base), kHugeBatch), u64(end - base)) / kHugePage * kHugePage;
    if (begin >= stop || is_populated(base + begin, base + stop)) return;
    for (u64 at = begin; at < stop; at += kHugePage)
        if (madvise(base + at, kPage, MADV_POPULATE_WRITE) != 0) return;
    if (madvise(base + begin, stop - begin, MADV_COLLAPSE) == 0) {
        huge_failures_.store(0, std::memory_order_relaxed);
        set_populated(base + begin, base + stop);
    } else {
        huge_failures_.fetch_add(1, std::memory_order_relaxed);
    }
}

void Store::prepare(u64 handle, u64 offset, u64 bytes) {
    Slot* slot = find(handle);
    if (!slot || slot->word.load() != slot_word(kSlotCreating, handle_generation(handle)) || slot->offset.load() == 0) return;
    const u64 size = slot->size.load();
    if (offset >= size || bytes == 0) return;
    char* data = segment_->base() + slot->offset.load();
    char* last = data + std::min(size, offset + bytes);
    make_huge(data + offset, last, data + size);
    populate(data + offset, last);
}

void Store::write(u64 handle, u64 offset, const void* source, u64 bytes) {
    u64 size;
    char* target = write_address(handle, size);
    if (offset > size || bytes > size - offset)
        throw std::invalid_argument("write past the object's end: offset " + std::to_string(offset) + " and " +
                                    std::to_string(bytes) + " bytes, but the object has " + std::to_string(size));
    target += offset;
    const char* from = static_cast<const char*>(source);
    const bool known = bytes < kPopulated || is_populated(target, target + bytes);
    // Populating in steps keeps the freshly zeroed pages in the cache for the copy that follows.
    auto copy = [this, known](char* to, const char* what, u64 length) {
        char* end = to + length;
        while (to != end) {
            u64 part = u64(end - to);
            if (!known) {
                part = std::min(part, kHugePage - u64(to - segment_->base()) % kHugePage);
                make_huge(to, to + part, end);
                populate(to, to + part);
            }
            memcpy(to, what, part);
            to += part, what += part;
        }
    };
    u64 workers = bytes > (8u << 20) ? u64(std::clamp(affinity_count(), 1, 4)) : 1;
    u64 share = (bytes / workers + 4095) & ~u64(4095);
    std::vector<std::thread> threads;
    u64 done = 0;
    for (u64 i = 1; i < workers && done + share < bytes; i++, done += share) {
        try {
            threads.emplace_back(copy, target + done, from + done, share);
        } catch (const std::system_error&) {
            break;  // no more threads allowed: do the rest here
        }
    }
    copy(target + done, from + done, bytes - done);
    for (std::thread& thread : threads) thread.join();
}

void Store::seal(u64 handle) {
    Slot* slot = find(handle);
    u64 expected = slot_word(kSlotCreating, handle_generation(handle));
    u64 owner = slot ? slot->owner.load() : 0;
    const u32 state = slot && slot->offset.load() == 0 ? kSlotSpilled : kSlotSealed;
    if (!slot || !slot->word.compare_exchange_strong(expected, slot_word(state, handle_generation(handle))))
        throw std::invalid_argument("seal: no object being created has this handle");
    if (address_incarnation(owner) != 0 && address_node(owner) == segment_->node() && !segment_->alive(owner))
        remove(handle);  // STORE-4
}

void Store::abort(u64 handle) {
    Slot* slot = find(handle);
    Segment::Lock lock(*segment_);
    if (!slot || slot->word.load() != slot_word(kSlotCreating, handle_generation(handle)))
        throw std::invalid_argument("abort: no object being created has this handle");
    store_free_locked(*segment_, handle_slot(handle), true);
}

const char* Store::pin(u64 handle, u64& size) {
    Slot* slot = find(handle);
    if (!slot) return nullptr;
    u32 index = handle_slot(handle);
    const u64 sealed = slot_word(kSlotSealed, handle_generation(handle));
    const u64 bit = u64(1) << (lane_ % 64);
    atomic<u64>& pins = slot->pins[lane_ / 64];
    std::lock_guard<std::mutex> guard(pins_mutex_);
    u32& count = pins_.get()[index];
    if (detached_ || slot->word.load() != sealed) return nullptr;
    if (count == 0) {
        pins.fetch_or(bit);                 // STORE-1: bit first,
        if (slot->word.load() != sealed) {  // then the state again
            pins.fetch_and(~bit);
            free_if_doomed(index);
            return nullptr;
        }
    }
    count++;
    slot->used_at.store(u64(monotonic_ns()), std::memory_order_relaxed);
    size = slot->size.load(std::memory_order_relaxed);
    return segment_->base() + slot->offset.load(std::memory_order_relaxed);
}

void Store::unpin(u64 handle) {
    u32 index = handle_slot(handle);
    Slot& slot = segment_->slot(index);
    std::lock_guard<std::mutex> guard(pins_mutex_);
    if (detached_ || --pins_.get()[index] != 0) return;
    slot.pins[lane_ / 64].fetch_and(~(u64(1) << (lane_ % 64)));
    free_if_doomed(index);
}

void Store::detach() {
    std::lock_guard<std::mutex> guard(pins_mutex_);
    detached_ = true;
}

void Store::free_if_doomed(u32 index) {  // STORE-2
    Slot& slot = segment_->slot(index);
    if (slot_state(slot.word.load()) != kSlotDoomed || slot_pinned(slot)) return;
    Segment::Lock lock(*segment_);
    store_free_locked(*segment_, index, false);
}

Removed Store::remove(u64 handle) {
    Slot* slot = find(handle);
    if (!slot) return Removed::kGone;
    u64 expected = slot_word(kSlotSealed, handle_generation(handle));
    if (slot->word.compare_exchange_strong(expected, slot_word(kSlotDoomed, handle_generation(handle)))) {
        free_if_doomed(handle_slot(handle));
        return Removed::kFromArena;
    }
    if (expected != slot_word(kSlotSpilled, handle_generation(handle))) return Removed::kGone;
    Segment::Lock lock(*segment_);  // STORE-5: it may be taken back until we have the mutex
    return store_delete_locked(*segment_, handle);
}

bool Store::spill(u64 handle) {
    Slot* slot = find(handle);
    if (!slot) return false;
    Segment::Lock lock(*segment_);
    const u64 sealed = slot_word(kSlotSealed, handle_generation(handle));
    u64 expected = sealed;
    if (!slot->word.compare_exchange_strong(expected, slot_word(kSlotSpilled, handle_generation(handle)))) return false;
    if (slot_pinned(*slot)) {
        slot->word.store(sealed);
        return false;
    }
    u64 position = heap_position(*segment_, slot->offset.load());
    slot->offset.store(0);  // killed here: HEAP-2 finds the block
    heap_free(*segment_, position);
    return true;
}

std::vector<Victim> Store::victims() {
    struct Candidate {
        u64 used_at;
        Victim victim;
    };
    std::vector<Candidate> candidates;
    for (u32 i = 0, high = segment_->slots_high(); i < high; i++) {
        Slot& slot = segment_->slot(i);
        u64 word = slot.word.load();
        if (slot_state(word) != kSlotSealed || slot.kind.load() != kKindObject || slot_pinned(slot)) continue;
        candidates.push_back({slot.used_at.load(), {make_handle(i, slot_generation(word)), slot.size.load()}});
    }
    std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.used_at < b.used_at; });
    std::vector<Victim> victims;
    victims.reserve(candidates.size());
    for (const Candidate& candidate : candidates) victims.push_back(candidate.victim);
    return victims;
}

void Store::room(u64& free, u64& largest) {
    Segment::Lock lock(*segment_);
    const Header& h = segment_->header();
    const u64 most = h.object_bytes.load();
    free = most - std::min(most, h.heap_used.load());
    largest = largest_for_objects(*segment_);
}

bool Store::claim(u64 handle) {
    Slot* slot = find(handle);
    if (!slot || slot_generation(slot->word.load()) != handle_generation(handle)) return false;
    // Under the mutex the slot cannot be freed and reused between the look and the store.
    Segment::Lock lock(*segment_);
    u64 word = slot->word.load();
    if (slot_generation(word) != handle_generation(handle) ||
        (slot_state(word) != kSlotCreating && slot_state(word) != kSlotSealed && slot_state(word) != kSlotSpilled))
        return false;
    slot->claimed.store(1);
    return true;
}

std::optional<ObjectRecord> Store::info(u64 handle) {
    Slot* slot = find(handle);
    if (!slot) return std::nullopt;
    u64 word = slot->word.load();
    u32 state = slot_state(word);
    if (slot_generation(word) != handle_generation(handle) || state == kSlotFree || state == kSlotDoomed) return std::nullopt;
    ObjectRecord record = record_of(*slot, handle_slot(handle), word);
    u64 again = slot->word.load();
    if (slot_generation(again) != handle_generation(handle) || slot_state(again) == kSlotFree) return std::nullopt;
    return record;
}

std::vector<ObjectRecord> Store::list() {
    std::vector<ObjectRecord> records;
    for (u32 i = 0, high = segment_->slots_high(); i < high; i++) {
        Slot& slot = segment_->slot(i);
        u64 word = slot.word.load();
        if (slot_state(word) == kSlotFree || slot_state(word) == kSlotDoomed) continue;
        if (slot.kind.load() != kKindObject) continue;
        ObjectRecord record = record_of(slot, i, word);
        u64 again = slot.word.load();
        if (slot_generation(again) == slot_generation(word) && slot_state(again) != kSlotFree)
            records.push_back(record);
    }
    return records;
}

StoreStatistics Store::statistics() {
    StoreStatistics s{};
    for (u32 i = 0, high = segment_->slots_high(); i < high; i++) {
        Slot& slot = segment_->slot(i);
        u32 state = slot_state(slot.word.load());
        if (state == kSlotFree) continue;
        if (slot.kind.load() == kKindFrame) {
            s.frames++;
            continue;
        }
        s.objects += state == kSlotSealed;
        s.creating += state == kSlotCreating;
        s.doomed += state == kSlotDoomed;
        s.spilled += state == kSlotSpilled;
        s.pinned += slot_pinned(slot);
    }
    Segment::Lock lock(*segment_);
    s.capacity_bytes = segment_->header().object_bytes.load();
    s.used_bytes = segment_->header().heap_used.load();
    s.largest_free_bytes = largest_for_objects(*segment_);
    return s;
}

u64 Store::trim() {
    Segment::Lock lock(*segment_);
    return heap_trim(*segment_);
}

}  // namespace hpc
