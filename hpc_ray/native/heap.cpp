#include "heap.h"

#include <fcntl.h>
#include <linux/falloc.h>

#include <algorithm>

#include "store.h"

namespace hpc {

namespace {

constexpr u64 kUnit = 64;
constexpr u64 kSmallest = 2 * kUnit;  // a header and one unit of data

u64 size_of(const Block& block) { return block.size.load(std::memory_order_relaxed) & ~u64(1); }
bool is_used(const Block& block) { return block.size.load(std::memory_order_relaxed) & 1; }
void commit_size(Block& block, u64 size, bool used) {
    block.size.store(size | u64(used), std::memory_order_release);  // HEAP-1
}
u64 end_of(Segment& segment) { return segment.header().heap_bytes / kUnit * kUnit - kUnit; }

// Size classes: eight for each power of two.
u32 bin_of(u64 size) {
    u64 units = size / kUnit;
    if (units < 8) return u32(units);
    u32 power = 63 - u32(__builtin_clzll(units));
    return (power - 2) * 8 + u32((units >> (power - 3)) & 7);
}

void list_insert(Segment& segment, u64 position) {
    Header& h = segment.header();
    Block& block = heap_block(segment, position);
    u32 bin = bin_of(size_of(block));
    block.previous_free = 0;
    block.next_free = h.bins[bin];
    if (block.next_free) heap_block(segment, block.next_free - 1).previous_free = position + 1;
    h.bins[bin] = position + 1;
    h.bin_bits[bin / 64] |= u64(1) << (bin % 64);
}

void list_remove(Segment& segment, u64 position) {
    Header& h = segment.header();
    Block& block = heap_block(segment, position);
    u32 bin = bin_of(size_of(block));
    if (block.next_free) heap_block(segment, block.next_free - 1).previous_free = block.previous_free;
    if (block.previous_free) {
        heap_block(segment, block.previous_free - 1).next_free = block.next_free;
    } else {
        h.bins[bin] = block.next_free;
        if (block.next_free == 0) h.bin_bits[bin / 64] &= ~(u64(1) << (bin % 64));
    }
}

u64 find(Segment& segment, u64 size) {
    Header& h = segment.header();
    u32 bin = bin_of(size);
    u64 next = h.bins[bin];
    for (int tries = 0; next != 0 && tries < 16; tries++) {
        Block& block = heap_block(segment, next - 1);
        if (size_of(block) >= size) return next - 1;
        next = block.next_free;
    }
    // Every block of a higher class is large enough.
    for (u32 from = bin + 1, word = from / 64; word < kHeapBins / 64; word++) {
        u64 bits = h.bin_bits[word];
        if (word == from / 64) bits &= ~u64(0) << (from % 64);
        if (bits) return h.bins[word * 64 + u32(__builtin_ctzll(bits))] - 1;
    }
    // Last resort: the rest of the exact class.
    for (; next != 0; next = heap_block(segment, next - 1).next_free)
        if (size_of(heap_block(segment, next - 1)) >= size) return next - 1;
    return kNoBlock;
}

bool owned(Segment& segment, u64 position) {  // HEAP-2
    u64 handle = heap_block(segment, position).handle;
    u32 index = handle_slot(handle);
    if (index >= segment.slots_high()) return false;
    Slot& slot = segment.slot(index);
    u64 word = slot.word.load();
    return slot_generation(word) == handle_generation(handle) && slot_state(word) != kSlotFree &&
           slot.offset.load() == heap_data(segment, position);
}

}  // namespace

void heap_format(Segment& segment) {
    u64 end = end_of(segment);
    Block& first = heap_block(segment, 0);
    first.magic = kBlockMagic;
    Block& last = heap_block(segment, end);
    last.magic = kBlockMagic;
    last.previous_size = end;
    commit_size(last, 0, true);
    commit_size(first, end, false);
    list_insert(segment, 0);
}

u64 heap_allocate(Segment& segment, u64 bytes, u64 handle) {
    u64 end = end_of(segment);
    if (bytes > end) return kNoBlock;
    u64 size = sizeof(Block) + (bytes + kUnit - 1) / kUnit * kUnit;
    if (size < kSmallest) size = kSmallest;
    u64 position = find(segment, size);
    if (position == kNoBlock) return kNoBlock;
    list_remove(segment, position);
    Block& block = heap_block(segment, position);
    u64 whole = size_of(block);
    block.handle = handle;
    if (whole - size >= kSmallest) {
        Block& rest = heap_block(segment, position + size);
        rest.magic = kBlockMagic;
        rest.handle = 0;
        rest.previous_size = size;
        commit_size(rest, whole - size, false);
        commit_size(block, size, true);
        heap_block(segment, position + whole).previous_size = whole - size;
        list_insert(segment, position + size);
    } else {
        size = whole;
        commit_size(block, whole, true);
    }
    segment.header().heap_used.fetch_add(size, std::memory_order_relaxed);
    return position;
}

void heap_free(Segment& segment, u64 position) {
    Block& block = heap_block(segment, position);
    u64 size = size_of(block);
    segment.header().heap_used.fetch_sub(size, std::memory_order_relaxed);
    commit_size(block, size, false);
    Block& next = heap_block(segment, position + size);
    if (!is_used(next)) {
        list_remove(segment, position + size);
        size += size_of(next);
        commit_size(block, size, false);
    }
    if (position != 0) {
        u64 before = position - block.previous_size;
        Block& previous = heap_block(segment, before);
        if (!is_used(previous)) {
            list_remove(segment, before);
            size += size_of(previous);
            position = before;
            commit_size(previous, size, false);
        }
    }
    heap_block(segment, position + size).previous_size = size;
    list_insert(segment, position);
}

u64 heap_largest_free(Segment& segment) {
    Header& h = segment.header();
    for (u32 word = kHeapBins / 64; word-- > 0;) {
        if (h.bin_bits[word] == 0) continue;
        u64 largest = 0;
        for (u64 next = h.bins[word * 64 + 63 - u32(__builtin_clzll(h.bin_bits[word]))]; next != 0;
             next = heap_block(segment, next - 1).next_free)
            largest = std::max(largest, size_of(heap_block(segment, next - 1)));
        return largest - sizeof(Block);
    }
    return 0;
}

u64 heap_trim(Segment& segment) {
    constexpr u64 page = 4096;
    u64 punched = 0, end = end_of(segment);
    for (u64 position = 0; position != end; position += size_of(heap_block(segment, position))) {
        Block& block = heap_block(segment, position);
        if (is_used(block)) continue;
        u64 from = (heap_data(segment, position) + page - 1) / page * page;
        u64 to = (segment.header().heap_at + position + size_of(block)) / page * page;
        if (to <= from) continue;
        if (fallocate(segment.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, off_t(from), off_t(to - from)) == 0)
            punched += to - from;
    }
    return punched;
}

void heap_repair(Segment& segment) {
    Header& h = segment.header();
    // Slots first: finish what was doomed and is pinned by nobody, so that its block counts as garbage below.
    u32 slots_used = 0;
    h.free_slot = 0;
    for (u32 i = segment.slots_high(); i-- > 0;) {
        Slot& slot = segment.slot(i);
        u64 word = slot.word.load();
        if (slot_state(word) == kSlotDoomed && !slot_pinned(slot)) {
            word = slot_word(kSlotFree, slot_generation(word));
            slot.word.store(word);
        } else if (slot_state(word) == kSlotSpilled && slot.offset.load() != 0) {  // STORE-5, half way
            if (slot_pinned(slot))
                slot.word.store(slot_word(kSlotSealed, slot_generation(word)));
            else
                slot.offset.store(0);
        }
        if (slot_state(word) == kSlotFree) {
            slot.next_free = h.free_slot;
            h.free_slot = i + 1;
        } else {
            slots_used++;
        }
    }
    h.slots_used.store(slots_used);
    for (u64& bits : h.bin_bits) bits = 0;
    for (u64& bin : h.bins) bin = 0;
    u64 used = 0, end = end_of(segment);
    u64 position = 0, before = 0;
    while (position != end) {
        Block& block = heap_block(segment, position);
        u64 size = size_of(block);
        if (block.magic != kBlockMagic || size < kSmallest || position + size > end)
            throw std::runtime_error("the arena's heap is corrupt at " + std::to_string(position) +
                                     ": something wrote past an object's end");
        block.previous_size = before;
        if (is_used(block) && owned(segment, position)) {
            used += size;
        } else {
            for (;;) {  // merge all free and ownerless blocks that follow
                u64 next = position + size;
                if (next == end) break;
                Block& following = heap_block(segment, next);
                if (is_used(following) && owned(segment, next)) break;
                if (following.magic != kBlockMagic || size_of(following) < kSmallest)
                    throw std::runtime_error("the arena's heap is corrupt at " + std::to_string(next));
                size += size_of(following);
            }
            commit_size(block, size, false);
            list_insert(segment, position);
        }
        before = size;
        position += size;
    }
    heap_block(segment, end).previous_size = before;
    h.heap_used.store(used);
}

void heap_validate(Segment& segment, std::vector<std::string>& problems) {
    Header& h = segment.header();
    u64 used = 0, free_blocks = 0, end = end_of(segment), before = 0;
    u32 used_blocks = 0;
    bool previous_was_free = false;
    for (u64 position = 0; position != end;) {
        Block& block = heap_block(segment, position);
        u64 size = size_of(block);
        if (block.magic != kBlockMagic || size < kSmallest || position + size > end) {
            problems.push_back("HEAP-1 broken at " + std::to_string(position));
            return;
        }
        if (block.previous_size != before) problems.push_back("previous_size wrong at " + std::to_string(position));
        if (is_used(block)) {
            if (!owned(segment, position)) problems.push_back("HEAP-2 broken at " + std::to_string(position));
            used += size;
            used_blocks++;
            previous_was_free = false;
        } else {
            if (previous_was_free) problems.push_back("two free blocks side by side at " + std::to_string(position));
            free_blocks++;
            previous_was_free = true;
        }
        before = size;
        position += size;
    }
    u64 listed = 0;
    for (u64 bin : h.bins)
        for (u64 next = bin; next != 0; next = heap_block(segment, next - 1).next_free) {
            if (is_used(heap_block(segment, next - 1))) problems.push_back("a used block is in a free list");
            if (++listed > free_blocks) break;
        }
    if (listed != free_blocks) problems.push_back("HEAP-3: free lists and heap differ");
    if (used != h.heap_used.load()) problems.push_back("heap_used is wrong");
    u32 slots = 0, in_heap = 0;
    for (u32 i = 0; i < segment.slots_high(); i++) {
        if (slot_state(segment.slot(i).word.load()) == kSlotFree) continue;
        slots++;
        in_heap += segment.slot(i).offset.load() != 0;
    }
    if (slots != h.slots_used.load() || in_heap != used_blocks)
        problems.push_back("objects, used slots and used blocks differ: " + std::to_string(slots) + ", " +
                           std::to_string(h.slots_used.load()) + "; " + std::to_string(in_heap) + ", " +
                           std::to_string(used_blocks));
    u32 free_slots = 0;
    for (u32 next = h.free_slot; next != 0 && free_slots <= segment.slots_high(); next = segment.slot(next - 1).next_free)
        free_slots++;
    if (free_slots + slots != segment.slots_high()) problems.push_back("slots are neither used nor free");
}

}  // namespace hpc
