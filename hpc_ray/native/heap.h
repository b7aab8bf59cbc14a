// heap: the arena's memory, blocks with a header in front, data aligned to 64 bytes.
//
// Everything here needs Segment::Lock held. Positions are bytes from the heap's start.
//
// HEAP-1 (walkable): at any instruction, the sizes in the headers lead from block to block to the end mark. A split
//   writes the rest's header first and commits by one store of the size; a merge is one store of the size.
// HEAP-2 (an object for each used block): a used block names the object that uses it, and that object's slot names
//   the block. A block without such a slot is garbage of a killed process; repair frees it.
// HEAP-3 (lists are a cache): free lists, previous sizes and counters are rebuilt by walking.
#pragma once

#include <string>
#include <vector>

#include "segment.h"

namespace hpc {

constexpr u64 kNoBlock = ~u64(0);

void heap_format(Segment& segment);
// A block with at least `bytes` of data for the object `handle`; kNoBlock when none is large enough.
u64 heap_allocate(Segment& segment, u64 bytes, u64 handle);
void heap_free(Segment& segment, u64 position);
u64 heap_largest_free(Segment& segment);
// Gives the pages of free blocks back to the system; bytes punched.
u64 heap_trim(Segment& segment);
void heap_repair(Segment& segment);
void heap_validate(Segment& segment, std::vector<std::string>& problems);

inline Block& heap_block(Segment& segment, u64 position) {
    return *reinterpret_cast<Block*>(segment.base() + segment.header().heap_at + position);
}
// Segment offset of a block's data.
inline u64 heap_data(Segment& segment, u64 position) {
    return segment.header().heap_at + position + sizeof(Block);
}
inline u64 heap_position(Segment& segment, u64 data_offset) {
    return data_offset - sizeof(Block) - segment.header().heap_at;
}

}  // namespace hpc
