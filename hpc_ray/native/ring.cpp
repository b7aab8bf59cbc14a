#include "ring.h"

#include <string.h>

#include "store.h"

namespace hpc {

u32 ring_acquire(Segment& segment, u32 dest, u32 src) {
    atomic<u32>& entry = segment.directory(dest, src);
    if (u32 found = entry.load()) {
        segment.ring(found - 1).closed.store(0);  // RING-2: take over
        return found - 1;
    }
    Header& h = segment.header();
    u32 index;
    if (h.free_ring != 0) {
        index = h.free_ring - 1;
        h.free_ring = segment.ring(index).next_free;
    } else {
        index = h.rings_high.load();
        if (index >= h.max_rings) return kNoRing;
        h.rings_high.store(index + 1);
    }
    RingControl& c = segment.ring(index);
    c.tail.store(0);
    c.head.store(0);
    c.want_space.store(0);
    c.closed.store(0);
    c.dest.store(dest);
    c.src.store(src);
    c.used.store(1);
    entry.store(index + 1);  // RING-4
    h.rings_used.fetch_add(1);
    return index;
}

void ring_release(Segment& segment, u32 dest, u32 src) {
    atomic<u32>& entry = segment.directory(dest, src);
    u32 found = entry.load();
    if (found == 0) return;
    ring_discard(segment, found - 1);
    entry.store(0);  // RING-4
    Header& h = segment.header();
    RingControl& c = segment.ring(found - 1);
    c.used.store(0);
    c.next_free = h.free_ring;
    h.free_ring = found;
    h.rings_used.fetch_sub(1);
}

namespace {

template <class Visit>
u64 visit_frames(Segment& segment, u32 ring, Visit visit) {
    RingControl& c = segment.ring(ring);
    const char* data = segment.ring_data(ring);
    u64 mask = segment.ring_bytes() - 1;
    u64 head = c.head.load(), tail = c.tail.load();
    while (head != tail) {
        Frame frame;
        u64 at = head & mask;
        memcpy(&frame, data + at, 8);
        if (frame.flags & kFramePad) {
            head += frame.length;
            continue;
        }
        if (frame.flags & kFrameObject) {
            u64 handle;
            memcpy(&handle, data + at + sizeof(Frame), sizeof handle);
            visit(handle);
        }
        head += frame_space(frame.length);
    }
    return tail;
}

}  // namespace

void ring_discard(Segment& segment, u32 ring) {
    u64 tail = visit_frames(segment, ring, [&](u64 handle) { store_delete_locked(segment, handle); });
    segment.ring(ring).head.store(tail);
}

void ring_objects(Segment& segment, u32 ring, std::vector<u64>& handles) {
    visit_frames(segment, ring, [&](u64 handle) { handles.push_back(handle); });
}

void ring_repair(Segment& segment) {
    Header& h = segment.header();
    h.free_ring = 0;
    u32 used = 0;
    for (u32 i = h.rings_high.load(); i-- > 0;) {
        RingControl& c = segment.ring(i);
        u32 dest = c.dest.load(), src = c.src.load();
        if (dest < h.max_lanes && src < h.max_lanes && segment.directory(dest, src).load() == i + 1) {
            c.used.store(1);
            used++;
        } else {
            c.used.store(0);
            c.next_free = h.free_ring;
            h.free_ring = i + 1;
        }
    }
    h.rings_used.store(used);
}

void ring_validate(Segment& segment, std::vector<std::string>& problems) {
    Header& h = segment.header();
    u32 used = 0, free = 0;
    for (u32 i = 0; i < h.rings_high.load(); i++) {
        RingControl& c = segment.ring(i);
        bool listed = segment.directory(c.dest.load(), c.src.load()).load() == i + 1;
        if (c.used.load() != u32(listed)) problems.push_back("ring " + std::to_string(i) + " breaks RING-4");
        if (listed) used++;
        if (listed && c.tail.load() - c.head.load() > segment.ring_bytes())
            problems.push_back("ring " + std::to_string(i) + " holds more than it can");
    }
    for (u32 next = h.free_ring; next != 0 && free <= h.rings_high.load(); next = segment.ring(next - 1).next_free)
        free++;
    if (used + free != h.rings_high.load()) problems.push_back("rings are neither used nor free");
    if (used != h.rings_used.load()) problems.push_back("rings_used is wrong");
}

void RingWriter::open(Segment& segment, u32 index) {
    ring = index;
    tail = segment.ring(index).tail.load();
    head = segment.ring(index).head.load();
}

bool RingWriter::put(Segment& segment, u32 flags, u64 src, u64 dest, const void* payload, u64 bytes) {
    RingControl& c = segment.ring(ring);
    const u64 capacity = segment.ring_bytes();
    const u64 length = sizeof(Frame) + bytes;
    const u64 space = frame_space(length);
    u64 at = tail & (capacity - 1);
    const u64 pad = at + space > capacity ? capacity - at : 0;
    if (capacity - (tail - head) < pad + space) {
        head = c.head.load();
        if (capacity - (tail - head) < pad + space) return false;
    }
    char* data = segment.ring_data(ring);
    u64 end = tail;
    if (pad != 0) {
        u32 words[2] = {u32(pad), kFramePad};
        memcpy(data + at, words, 8);
        end += pad;
        at = 0;
    }
    Frame frame{u32(length), flags, src, dest};
    memcpy(data + at, &frame, sizeof frame);
    if (bytes != 0) memcpy(data + at + sizeof frame, payload, bytes);
    tail = end + space;
    c.tail.store(tail);  // RING-1; seq_cst because of LANE-3
    return true;
}

}  // namespace hpc
