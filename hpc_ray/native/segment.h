// segment: one node's shared memory, mapped whole by every process of the node.
//
// One memfd holds everything, so nothing can be left behind in /dev/shm and its size limit does not matter; memory is
// sparse, only touched pages count. The fd is close-on-exec: a fork inherits it, for an exec or another process pass
// it explicitly (pass_fds, SCM_RIGHTS).
//
// SEGMENT-1 (self-describing): attach trusts nothing but the header, and refuses another magic, version or size.
// SEGMENT-2 (fixed size): the memfd is sealed against shrinking and growing, so a mapped byte never raises SIGBUS.
// SEGMENT-3 (repair): a process killed while it holds the mutex leaves it to the next taker, who rebuilds all derived
//   words before anything else happens; a repair killed half way is simply done again.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "layout.h"

namespace hpc {

struct SegmentOptions {
    u32 node = 0;
    u64 arena_bytes = 0;
    u32 max_lanes = 1024;
    u32 ring_bytes = 65536;
};

struct LaneRecord {
    u64 address;
    u32 state;
    u32 pid;
};

struct SegmentStatistics {
    u64 total_bytes, resident_bytes, heap_bytes, heap_used_bytes, repairs;
    u32 lanes_open, lanes_dead, rings_used, rings_capacity, slots_used, slots_capacity;
};

class Segment {
  public:
    // Creates a node's segment. Any thread. Throws invalid_argument or runtime_error (with errno's text).
    static std::shared_ptr<Segment> create(const SegmentOptions& options);
    // Maps an existing one; the fd stays the caller's, a duplicate is kept. Throws invalid_argument when it is no
    // segment of this layout.
    static std::shared_ptr<Segment> attach(int fd);
    ~Segment();
    Segment(const Segment&) = delete;
    Segment& operator=(const Segment&) = delete;

    int fd() const { return fd_; }
    u32 node() const { return header().node; }

    // OPEN -> DEAD in one store; from then on sends to it answer -1. False when it was not open. Any process.
    // Objects may fill so much of the heap from now on, at most what it was made with; those that are there stay.
    void limit_objects(u64 bytes);
    bool mark_dead(u64 address);
    // Whether an open lane (its index) has still to read frames of another one, whose process has ended. Lock-free.
    bool unread(u64 address, u32 reader) const;
    // True while the lane is open in that very incarnation; incarnation 0 asks for "anybody".
    bool alive(u64 address) const;
    std::vector<LaneRecord> lanes() const;
    SegmentStatistics statistics();
    // Walks everything under the mutex; an empty list when all invariants hold. For tests.
    std::vector<std::string> validate();

    // ---- for the other parts of the core -------------------------------------------------------------------------
    Header& header() const { return *reinterpret_cast<Header*>(base_); }
    char* base() const { return base_; }
    u64 bytes() const { return bytes_; }
    LaneEntry& lane(u32 index) const { return lanes_[index]; }
    atomic<u32>& directory(u32 dest, u32 src) const { return directory_[u64(dest) * max_lanes_ + src]; }
    RingControl& ring(u32 ring) const { return rings_[ring]; }
    char* ring_data(u32 ring) const { return ring_data_ + u64(ring) * ring_bytes_; }
    Slot& slot(u32 index) const { return slots_[index]; }
    u32 ring_bytes() const { return ring_bytes_; }
    u32 lanes_high() const { return header().lanes_high.load(std::memory_order_acquire); }
    u32 slots_high() const { return header().slots_high.load(std::memory_order_acquire); }

    // Holds the robust mutex; repairs first when its last holder died.
    class Lock {
      public:
        explicit Lock(Segment& segment);
        ~Lock();
        Lock(const Lock&) = delete;
        Lock& operator=(const Lock&) = delete;

      private:
        Segment& segment_;
    };

  private:
    Segment(int fd, char* base, u64 bytes);
    void repair();

    int fd_;
    char* base_;
    u64 bytes_;
    u32 max_lanes_ = 0;
    u32 ring_bytes_ = 0;
    LaneEntry* lanes_ = nullptr;
    atomic<u32>* directory_ = nullptr;
    RingControl* rings_ = nullptr;
    char* ring_data_ = nullptr;
    Slot* slots_ = nullptr;
};

// Bumps when the process is a fork of the one it was: a lane belongs to the process that opened it.
u32 fork_generation();

}  // namespace hpc
