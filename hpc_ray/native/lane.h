// lane: a process's inbox, and its way to all other lanes.
//
// For each ordered pair of lanes there is a ring (ring.h); a bit for each source says "look there"; two futex words
// wake the foreground or the background thread. A process has one lane, opened by it and not by its parent.
//
// LANE-1 (never blocks): send copies into the ring, or, when it is full, into a private backlog that later sends, all
//   receives and flush() drain in order. FIFO for each pair; no order across pairs.
// LANE-2 (one producer, one consumer): out_mutex_ makes this process one producer, in_mutex_ one consumer. Order of
//   locks: turn_, in_mutex_, out_mutex_, Segment::Lock. Nothing of Python runs under any of them.
// LANE-3 (no lost frame): the sender stores tail, then reads the ready bit; the receiver clears the bit, then reads
//   tail; all four are seq_cst, so either the sender sees the bit cleared and sets it again, or the receiver sees the
//   new tail (Dekker). The same argument covers want_space (sender: want_space then head; receiver: head then
//   want_space).
// LANE-4 (no lost wake-up): the sleeper stores its waiter bit, then reads the ready bits, then sleeps on the futex word
//   it read before; the sender sets the ready bit, then reads waiter. Either the sleeper sees the frame or the sender
//   sees the sleeper. With FOREGROUND_ACTIVE the sender relies on the foreground thread, which clears that bit, then
//   reads the ready bits once more, and hands what is left to a parked background thread (leave_foreground).
// LANE-5 (killed wakers): a process killed between setting a bit and waking has a ring with the sleeper, and reclaim
//   sets the bits and wakes all who have a ring with the dead lane. Parking needs no safety time-out for that.
// LANE-6 (background comes second): while the foreground thread drains now and then, the background thread does not, and looks
//   more and more rarely, also while the foreground would drain if it had a core; senders make no system call for it while it ticks,
//   unless the foreground has left for a while and it still rests.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "ring.h"
#include "store.h"

namespace hpc {

// Takes frames out of a ring. `payload` is valid during the call only. False: stop, this frame stays in the ring.
// Called with in_mutex_ held: must not run Python code or call the lane.
class FrameSink {
  public:
    virtual bool take(u64 src, u64 dest, const char* payload, u64 bytes) = 0;

  protected:
    ~FrameSink() = default;
};

enum class Wait { kReady, kTimeout, kWoken, kInterrupted, kClosed };

struct LaneStatistics {
    u64 sent, received, backlog_bytes, backlogged, dropped, lost, parks, spins, wakes, background_ticks;
};

struct Unclaimed;

constexpr i64 kNever = INT64_MAX;
i64 monotonic_ns();

// The foreground's turn: a mutex that one can wait for with a deadline. (std::timed_mutex is that as well, but gcc 12's
// ThreadSanitizer does not know its calls.)
class Turn {
  public:
    bool try_take();
    bool take(i64 deadline_ns);  // false: time is up
    void give();

  private:
    std::mutex mutex_;
    std::condition_variable given_;
    bool taken_ = false;
    int waiting_ = 0;
};

class Lane {
  public:
    // Claims `index`, or the lowest free index >= 16 when it is negative. Throws runtime_error when it is taken or none
    // is left. The lane belongs to this process; a fork of it gets runtime_error from everything below.
    static std::shared_ptr<Lane> open(std::shared_ptr<Segment> segment, int index);
    ~Lane();

    u64 address() const { return address_; }
    Store& store() { return store_; }
    Segment& segment() { return *segment_; }

    // Any thread; never waits for another process. Bytes in the backlog for this destination, or -1: it is dead.
    // Throws ArenaFull for a large payload, invalid_argument for an address that cannot be.
    i64 send(u64 dest, const void* payload, u64 bytes);
    // The link's: the frame keeps `src`, and `dest` must be of this node.
    i64 forward(u64 src, u64 dest, const void* payload, u64 bytes);
    // Whether a frame from another node is to be forwarded: it is for a lane of this node, but not for the link's own.
    bool forwards(u64 dest) const { return address_node(dest) == segment_->node() && address_index(dest) != index_; }
    // Moves what fits from the backlogs to the rings; bytes left.
    u64 flush();

    // Takes up to `limit` frames without waiting; nothing once the lane is closed. Any thread.
    u64 drain(FrameSink& sink, u64 limit, bool foreground);
    // Takes the frames of one source, dead or not, up to the first frame of a successor of it. Any thread.
    u64 drain_from(u64 src, FrameSink& sink);

    // A foreground thread's turn, one thread at a time: enter, wait and drain as often as it likes, leave.
    bool enter_foreground(i64 deadline_ns);  // waits for the other thread's turn; false: time is up
    bool try_enter_foreground();
    void leave_foreground();
    u64 foreground_drains() const { return foreground_drains_.load(std::memory_order_relaxed); }
    // Spins, then parks, until there is something to drain, deadline, wake() or a signal. Without the GIL.
    Wait wait_foreground(i64 deadline_ns, bool spin);
    // Parks or ticks until it is the background's turn to drain. One thread only. Without the GIL.
    Wait wait_background(i64 deadline_ns);

    // Ends the current or, if there is none, the next wait of that side. Any thread.
    void wake();
    void wake_background();

    // Orderly leave: flushes for up to timeout_s, then frees what the lane held, as reclaim does, and returns the same
    // list. Waits in other threads end with kClosed. Later calls throw, a second close does nothing.
    std::vector<Unclaimed> close(double timeout_s);
    bool closed() const { return closed_.load(); }

    LaneStatistics statistics();
    // Throws runtime_error in a fork and after close.
    void check() const;
    // Never throws: for destructors.
    bool usable() const { return !closed_.load() && fork_generation() == fork_generation_; }
    bool same_process() const { return fork_generation() == fork_generation_; }

    atomic<int> eager{0};  // > 0: the background thread drains at once

  private:
    struct Backlogged {
        u32 flags;
        u64 src, dest;
        std::unique_ptr<char[]> payload;
        u64 bytes;
    };
    struct Outbound {
        RingWriter writer;
        std::deque<Backlogged> backlog;
        u64 backlog_bytes = 0;
    };

    Lane(std::shared_ptr<Segment> segment, u64 address);
    i64 put(u64 src, u64 dest, u32 target, const void* payload, u64 bytes);
    bool store_payload(const void* payload, u64 bytes, u64& handle);
    bool put_frame(Outbound& out, u32 target, u32 flags, u64 src, u64 dest, const void* payload, u64 bytes);
    bool acceptable(u32 target, u64 dest) const;
    void flush_to(u32 target);
    void drop_backlog(Outbound& out);
    void serve_source(u32 source);
    u64 drain_ring(u32 source, FrameSink& sink, u64 limit, u64 only_src, bool& left);
    bool any_ready() const;
    void notify(u32 target);
    void wake_entry(LaneEntry& entry);
    i64 park_until(i64 deadline_ns);
    void tick(u32 seen, i64 end_ns);
    void tick_with_backlog(u32 seen, i64 end_ns);
    bool foreground_waits_for_core(i64 now) const;

    std::shared_ptr<Segment> segment_;
    const u64 address_;
    const u32 index_;
    const u32 fork_generation_;
    LaneEntry& entry_;
    Store store_;
    atomic<bool> closed_{false};

    std::mutex out_mutex_;
    std::vector<std::unique_ptr<Outbound>> outbound_;  // by lane index
    atomic<u64> backlog_bytes_{0};
    atomic<bool> starved_{false};  // a backlog waits for a ring from the pool or for room in the arena: nobody will tell, so look again

    std::mutex in_mutex_;
    u32 next_source_ = 0;
    atomic<u64> foreground_drains_{0};
    atomic<int> foreground_thread_{0};  // the last one
    atomic<bool> resting_{false};       // the background ticks at long intervals

    Turn turn_;
    atomic<bool> fg_wake_{false};
    atomic<bool> bg_wake_{false};
    const i64 spin_limit_;
    // How long to spin before parking: longer than what lately was worth it, and not at all where the awaited process needs
    // this core (others have the rest): there a spin that ends in parking has only kept it waiting.
    i64 spin_ns_;
    u32 unspun_ = 0;  // waits since the last spin
    u32 missed_ = 0;  // spins in vain since one was worth it

    // The background thread's own.
    i64 background_active_ns_ = 0;
    u64 drains_seen_ = 0;  // of the foreground's
    i64 drained_ns_ = 0;   // when they were seen to grow, or it drained itself or was woken
    i64 worked_ns_ = 0;    // what the foreground's thread had worked when they were
    i64 tick_ns_;
    i64 rested_ns_ = 0;    // the tick before it was hurried, until the next look
    bool hurried_ = false;

    u64 sent_ = 0, received_ = 0, backlogged_ = 0, dropped_ = 0, lost_ = 0;
    atomic<u64> parks_{0}, spins_{0}, wakes_{0}, ticks_{0};
};

// Wakes both threads of a lane whatever its waiter word says (LANE-5).
void lane_wake_all(LaneEntry& entry);

}  // namespace hpc
