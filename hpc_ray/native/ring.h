// ring: a single-producer single-consumer byte ring for one ordered pair of lanes.
//
// RING-1 (own harm only): a frame is published by one store of tail, so a producer killed at any instruction leaves
//   an unpublished rest that nobody sees; nobody ever waits for it.
// RING-2 (pair): a ring belongs to a pair of lane *indices*; each frame names its incarnations. A new incarnation of
//   either side goes on with the ring it finds, and the consumer drops frames for its predecessors.
// RING-3 (who frees): a ring is freed, under the mutex, by its consumer when the producer is dead (closed) and it is
//   drained; by its producer when the consumer is not open; by reclaim when neither lives. So a live process's cached
//   ring index stays valid.
// RING-4 (commit): the directory entry is the commit: ring r is in use if and only if directory[dest][src] == r + 1.
#pragma once

#include <string>
#include <vector>

#include "segment.h"

namespace hpc {

constexpr u32 kNoRing = ~u32(0);

// All of these: the caller holds Segment::Lock.
// The pair's ring, from the pool if there is none yet; takes over what a dead predecessor left. kNoRing: pool used up.
u32 ring_acquire(Segment& segment, u32 dest, u32 src);
// Gives the pair's ring back with all that is in it (arena objects of its frames are deleted).
void ring_release(Segment& segment, u32 dest, u32 src);
// Acts as the consumer of a dead lane: drops all frames and deletes their arena objects.
void ring_discard(Segment& segment, u32 ring);
// The arena objects that frames still in the ring refer to; the producer must be dead.
void ring_objects(Segment& segment, u32 ring, std::vector<u64>& handles);
void ring_repair(Segment& segment);
void ring_validate(Segment& segment, std::vector<std::string>& problems);

inline u64 frame_space(u64 length) { return (length + 7) & ~u64(7); }

// Where the producer stands; private to its process, guarded by the lane's out mutex.
struct RingWriter {
    u32 ring = kNoRing;
    u64 tail = 0;
    u64 head = 0;  // as last seen

    void open(Segment& segment, u32 index);
    // Copies and publishes one frame; false when there is no room. Lock-free.
    bool put(Segment& segment, u32 flags, u64 src, u64 dest, const void* payload, u64 bytes);
};

}  // namespace hpc
