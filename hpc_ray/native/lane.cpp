#include "lane.h"

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <limits>
#include <thread>
#include <utility>

#include "process.h"
#include "reclaim.h"

namespace hpc {

namespace {

constexpr i64 kSpinLimit = 80'000;              // ns; about what it costs to be woken where cores sleep deeply
constexpr u32 kSpinMissed = 3;                  // spins in vain, one after the other, that are the last
constexpr u32 kSpinAgain = 32;                  // waits that park before one spins to see whether that pays again
constexpr u32 kFrameUnstored = 1u << 31;           // in a backlog only: a large payload that still lies in private memory
constexpr i64 kTick = 1'000'000;                // the background's look while it does not park,
constexpr i64 kLongTick = 8'000'000;            // for as long as the foreground keeps draining,
constexpr i64 kLongestTick = 16'000'000;        // and if it has drained so often since the last look:
constexpr u64 kManyDrains = 4;
constexpr i64 kInUserCode = 200'000;            // a foreground that has computed for so long since it drained is
constexpr i64 kNoMorePatience = 200'000'000;    // and so may be one that has waited for a core for so long
constexpr i64 kBackgroundPatience = 50'000'000; // without traffic it parks after this
constexpr i64 kStarved = 10'000'000;
constexpr i64 kSignalSlice = 500'000'000;       // the main thread looks for Python signals at least this often

void pause_cpu() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Not FUTEX_PRIVATE: the word is shared. Returns 0, EAGAIN, EINTR or ETIMEDOUT.
int futex_wait(atomic<u32>& word, u32 expected, i64 deadline_ns) {
    timespec deadline, *timeout = nullptr;
    if (deadline_ns != kNever) {
        deadline.tv_sec = deadline_ns / 1'000'000'000;
        deadline.tv_nsec = deadline_ns % 1'000'000'000;
        timeout = &deadline;
    }
    long rc = syscall(SYS_futex, reinterpret_cast<u32*>(&word), FUTEX_WAIT_BITSET, expected, timeout, nullptr,
                      FUTEX_BITSET_MATCH_ANY);
    return rc == 0 ? 0 : errno;
}

void futex_wake(atomic<u32>& word) {
    word.fetch_add(1);
    syscall(SYS_futex, reinterpret_cast<u32*>(&word), FUTEX_WAKE, std::numeric_limits<int>::max(), nullptr, nullptr, 0);
}

bool is_main_thread() { return thread_id() == process_id(); }

}  // namespace

i64 monotonic_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return i64(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

void lane_wake_all(LaneEntry& entry) {
    entry.waiter.fetch_and(~u32(kForegroundParked | kBackgroundParked));
    futex_wake(entry.fg_word);
    futex_wake(entry.bg_word);
}

// ---- opening and closing -----------------------------------------------------------------------------------------

std::shared_ptr<Lane> Lane::open(std::shared_ptr<Segment> segment, int index) {
    Segment& s = *segment;
    Header& h = s.header();
    if (index >= int(h.max_lanes))
        throw std::invalid_argument("lane index " + std::to_string(index) + ": this segment has " +
                                    std::to_string(h.max_lanes) + " lanes");
    Segment::Lock lock(s);
    u32 chosen;
    if (index >= 0) {
        chosen = u32(index);
        u64 word = s.lane(chosen).word.load();
        if (lane_state(word) != kLaneFree)
            throw std::runtime_error("lane " + std::to_string(index) + " is " +
                                     (lane_state(word) == kLaneOpen ? "open" : "dead but not reclaimed") +
                                     " (process " + std::to_string(s.lane(chosen).pid.load()) + ")");
    } else {
        chosen = kWellKnownLanes;
        while (chosen < h.max_lanes && lane_state(s.lane(chosen).word.load()) != kLaneFree) chosen++;
        if (chosen == h.max_lanes)
            throw std::runtime_error("all " + std::to_string(h.max_lanes) + " lanes of this node are taken");
    }
    LaneEntry& entry = s.lane(chosen);
    u32 incarnation = lane_incarnation(entry.word.load()) + 1;
    if (incarnation == 0) incarnation = 1;
    if (chosen >= h.lanes_high.load()) h.lanes_high.store(chosen + 1);
    entry.pid.store(u32(getpid()));
    entry.waiter.store(0);
    entry.alone_since.store(0);
    // Frames may have come before: look at every ring there is.
    for (u32 src = 0; src < h.lanes_high.load(); src++)
        if (s.directory(chosen, src).load() != 0) entry.ready[src / 64].fetch_or(u64(1) << (src % 64));
    std::shared_ptr<Lane> lane(new Lane(segment, make_address(s.node(), chosen, incarnation)));
    entry.word.store(lane_word(kLaneOpen, incarnation));  // LAYOUT-1
    return lane;
}

Lane::Lane(std::shared_ptr<Segment> segment, u64 address)
    : segment_(std::move(segment)),
      address_(address),
      index_(address_index(address)),
      fork_generation_(fork_generation()),
      entry_(segment_->lane(index_)),
      store_(segment_, address),
      outbound_(segment_->header().max_lanes),
      spin_limit_(affinity_count() > 1 ? kSpinLimit : 0),  // alone on one core, spinning only keeps the sender away
      spin_ns_(spin_limit_),
      tick_ns_(kTick) {}

Lane::~Lane() = default;  // without close() the lane stays open until somebody reclaims it: it may have pins

void Lane::check() const {
    if (fork_generation() != fork_generation_)
        throw std::runtime_error("this lane belongs to the process that this one was forked from: open a lane of your own");
    if (closed_.load()) throw std::runtime_error("the lane is closed");
}

std::vector<Unclaimed> Lane::close(double timeout_s) {
    if (!same_process()) check();
    if (closed_.load()) return {};
    i64 deadline = monotonic_ns() + i64(timeout_s * 1e9);
    while (flush() != 0 && monotonic_ns() < deadline) std::this_thread::sleep_for(std::chrono::microseconds(100));
    if (closed_.exchange(true)) return {};
    lane_wake_all(entry_);
    turn_.take(kNever);
    std::unique_ptr<Turn, void (*)(Turn*)> give_back(&turn_, [](Turn* turn) { turn->give(); });
    std::lock_guard<std::mutex> in(in_mutex_);
    std::lock_guard<std::mutex> out(out_mutex_);
    for (auto& outbound : outbound_)
        if (outbound) drop_backlog(*outbound);
    store_.detach();
    segment_->mark_dead(address_);
    return reclaim(*segment_, address_);
}

// ---- the outgoing side -------------------------------------------------------------------------------------------

bool Lane::acceptable(u32 target, u64 dest) const {
    u64 word = segment_->lane(target).word.load();
    u32 incarnation = address_node(dest) == segment_->node() ? address_incarnation(dest) : 0;
    if (incarnation != 0) return word == lane_word(kLaneOpen, incarnation);
    return lane_state(word) != kLaneDead;  // open, or a well-known lane that is not open yet
}

i64 Lane::send(u64 dest, const void* payload, u64 bytes) {
    return put(address_, dest, address_node(dest) == segment_->node() ? address_index(dest) : kLinkLane, payload, bytes);
}

i64 Lane::forward(u64 src, u64 dest, const void* payload, u64 bytes) {
    if (address_node(dest) != segment_->node())
        throw std::invalid_argument("forward delivers on this node only; the destination is on node " +
                                    std::to_string(address_node(dest)));
    return put(src, dest, address_index(dest), payload, bytes);
}

i64 Lane::put(u64 src, u64 dest, u32 target, const void* payload, u64 bytes) {
    check();
    if (target >= outbound_.size())
        throw std::invalid_argument("no such lane: index " + std::to_string(target));
    if (target >= kWellKnownLanes && address_incarnation(dest) == 0)
        throw std::invalid_argument("incarnation 0 (whoever is there) is for lanes below 16 only");
    std::lock_guard<std::mutex> guard(out_mutex_);
    check();  // again: close holds the lock while it frees the rings
    if (!acceptable(target, dest)) {
        dropped_++;
        if (outbound_[target]) flush_to(target);
        return -1;
    }
    auto& slot = outbound_[target];
    if (!slot) slot = std::make_unique<Outbound>();
    Outbound& out = *slot;

    u32 flags = 0;
    u64 handle;
    if (bytes > segment_->ring_bytes() / 4) {
        if (store_payload(payload, bytes, handle)) {
            payload = &handle;
            bytes = sizeof handle;
            flags = kFrameObject;
        } else {
            flags = kFrameUnstored;
        }
    }
    sent_++;
    if (!out.backlog.empty()) flush_to(target);
    if (flags != kFrameUnstored && out.backlog.empty() && put_frame(out, target, flags, src, dest, payload, bytes)) {
        notify(target);
        return 0;
    }
    Backlogged frame{flags, src, dest, std::unique_ptr<char[]>(new char[bytes + 1]), bytes};
    memcpy(frame.payload.get(), payload, bytes);
    out.backlog.push_back(std::move(frame));
    out.backlog_bytes += bytes;
    backlog_bytes_ += bytes;
    backlogged_++;
    return i64(out.backlog_bytes);
}

// Moves a large payload to the arena; false while that has no room: then it waits in the backlog, and flushing tries again.
bool Lane::store_payload(const void* payload, u64 bytes, u64& handle) {
    static const char no_id[kObjectIdBytes] = {};
    try {
        handle = store_.create(no_id, bytes, address_, kKindFrame);
    } catch (const ArenaFull& full) {
        if (bytes >= full.capacity_bytes) throw;  // it never will have
        starved_ = true;
        return false;
    }
    store_.write(handle, 0, payload, bytes);
    store_.seal(handle);
    return true;
}

bool Lane::put_frame(Outbound& out, u32 target, u32 flags, u64 src, u64 dest, const void* payload, u64 bytes) {
    Segment& s = *segment_;
    if (out.writer.ring == kNoRing) {
        Segment::Lock lock(s);
        if (target >= s.lanes_high()) s.header().lanes_high.store(target + 1);  // a well-known lane, not open yet
        u32 ring = ring_acquire(s, target, index_);
        if (ring == kNoRing) {
            starved_ = true;
            return false;
        }
        out.writer.open(s, ring);
    }
    if (out.writer.put(s, flags, src, dest, payload, bytes)) return true;
    s.ring(out.writer.ring).want_space.store(1);  // LANE-3: want_space, then head
    return out.writer.put(s, flags, src, dest, payload, bytes);
}

void Lane::drop_backlog(Outbound& out) {
    for (Backlogged& frame : out.backlog) {
        dropped_++;
        if (frame.flags & kFrameObject) {
            u64 handle;
            memcpy(&handle, frame.payload.get(), sizeof handle);
            store_.remove(handle);
        }
    }
    out.backlog.clear();
    backlog_bytes_ -= out.backlog_bytes;
    out.backlog_bytes = 0;
}

// Moves backlog to the ring; gives the ring back when nobody is at the other end. out_mutex_ held.
void Lane::flush_to(u32 target) {
    Outbound& out = *outbound_[target];
    Segment& s = *segment_;
    bool published = false;
    while (!out.backlog.empty()) {
        Backlogged& frame = out.backlog.front();
        u64 size = frame.bytes;
        if (acceptable(target, frame.dest)) {
            if (frame.flags == kFrameUnstored) {
                u64 handle;
                if (!store_payload(frame.payload.get(), frame.bytes, handle)) break;
                memcpy(frame.payload.get(), &handle, sizeof handle);
                frame.flags = kFrameObject;
                frame.bytes = sizeof handle;
                out.backlog_bytes -= size - frame.bytes;
                backlog_bytes_ -= size - frame.bytes;
            }
            if (!put_frame(out, target, frame.flags, frame.src, frame.dest, frame.payload.get(), frame.bytes)) break;
            published = true;
        } else {
            dropped_++;
            if (frame.flags & kFrameObject) {
                u64 handle;
                memcpy(&handle, frame.payload.get(), sizeof handle);
                store_.remove(handle);
            }
        }
        out.backlog_bytes -= frame.bytes;
        backlog_bytes_ -= frame.bytes;
        out.backlog.pop_front();
    }
    if (published) notify(target);
    if (out.backlog.empty() && out.writer.ring != kNoRing && lane_state(s.lane(target).word.load()) != kLaneOpen) {
        Segment::Lock lock(s);  // RING-3
        RingControl& ring = s.ring(out.writer.ring);
        u32 state = lane_state(s.lane(target).word.load());
        bool waiting = state == kLaneFree && target < kWellKnownLanes && ring.head.load() != ring.tail.load();
        if (state != kLaneOpen && !waiting) {
            ring_release(s, target, index_);
            out.writer = RingWriter();
        }
    }
}

u64 Lane::flush() {
    if (!same_process()) check();
    if (backlog_bytes_.load() == 0 && !starved_.load()) return 0;
    std::lock_guard<std::mutex> guard(out_mutex_);
    if (closed_.load()) return 0;
    starved_ = false;  // put_frame sets it again
    for (u32 target = 0; target < outbound_.size(); target++)
        if (outbound_[target] && !outbound_[target]->backlog.empty()) flush_to(target);
    return backlog_bytes_.load();
}

void Lane::notify(u32 target) {
    LaneEntry& entry = segment_->lane(target);
    atomic<u64>& ready = entry.ready[index_ / 64];
    const u64 bit = u64(1) << (index_ % 64);
    if (!(ready.load() & bit)) ready.fetch_or(bit);  // LANE-3
    wake_entry(entry);
}

void Lane::wake_entry(LaneEntry& entry) {  // LANE-4
    u32 waiter = entry.waiter.load();
    if (waiter & kForegroundParked) {
        if (entry.waiter.fetch_and(~u32(kForegroundParked)) & kForegroundParked) {
            wakes_.fetch_add(1, std::memory_order_relaxed);
            futex_wake(entry.fg_word);
        }
    } else if (waiter & kForegroundActive) {
    } else if (waiter & kBackgroundParked) {
        if (entry.waiter.fetch_and(~u32(kBackgroundParked)) & kBackgroundParked) {
            wakes_.fetch_add(1, std::memory_order_relaxed);
            futex_wake(entry.bg_word);
        }
    } else if (i64 since = entry.alone_since.load(std::memory_order_relaxed)) {  // LANE-6
        if (monotonic_ns() - since > kTick && entry.alone_since.compare_exchange_strong(since, 0)) {
            wakes_.fetch_add(1, std::memory_order_relaxed);
            futex_wake(entry.bg_word);
        }
    }
}

// ---- the incoming side -------------------------------------------------------------------------------------------

bool Lane::any_ready() const {
    for (u32 word = 0, words = (segment_->lanes_high() + 63) / 64; word < words; word++)
        if (entry_.ready[word].load() != 0) return true;
    return false;
}

u64 Lane::drain(FrameSink& sink, u64 limit, bool foreground) {
    if (!same_process()) check();
    if (foreground) foreground_drains_.fetch_add(1, std::memory_order_relaxed);
    if (starved_.load()) flush();
    if (!any_ready()) return 0;
    u64 taken = 0;
    bool rest = false;
    {
        std::lock_guard<std::mutex> guard(in_mutex_);
        if (closed_.load()) return 0;
        const u32 words = (segment_->lanes_high() + 63) / 64;
        const u32 start = next_source_;
        // Once around, from where the last call stopped; the start word comes again for its lower bits.
        for (u32 step = 0; step <= words && !rest; step++) {
            const u32 word = (start / 64 + step) % words;
            u64 bits = entry_.ready[word].load();
            if (step == 0) bits &= ~u64(0) << (start % 64);
            if (step == words) bits &= ~(~u64(0) << (start % 64));
            while (bits != 0) {
                const u32 source = word * 64 + u32(__builtin_ctzll(bits));
                const u64 bit = bits & -bits;
                if (taken == limit) {
                    next_source_ = source;
                    rest = true;
                    break;
                }
                bits &= ~bit;
                entry_.ready[word].fetch_and(~bit);  // LANE-3: the bit, then tail
                bool left = false;
                taken += drain_ring(source, sink, limit - taken, 0, left);
                serve_source(source);
                if (left) {
                    entry_.ready[word].fetch_or(bit);
                    next_source_ = (source + 1) % (words * 64);
                    rest = true;
                    break;
                }
            }
        }
        received_ += taken;
    }
    // What is left here is announced to nobody by its senders: see to it that the background looks (LANE-4).
    if (rest && (entry_.waiter.load() & (kBackgroundParked | kForegroundActive)) == kBackgroundParked) wake_entry(entry_);
    return taken;
}

u64 Lane::drain_from(u64 src, FrameSink& sink) {
    check();
    if (address_node(src) != segment_->node() || address_index(src) >= outbound_.size())
        throw std::invalid_argument("receive_from: the source must be a lane of this node");
    std::lock_guard<std::mutex> guard(in_mutex_);
    check();
    bool left = false;
    // The ready bit stays as it is: at worst somebody looks at an empty ring.
    u64 taken = drain_ring(address_index(src), sink, ~u64(0), src, left);
    received_ += taken;
    return taken;
}

// in_mutex_ held. `only_src`: stop at the first frame of another incarnation.
u64 Lane::drain_ring(u32 source, FrameSink& sink, u64 limit, u64 only_src, bool& left) {
    Segment& s = *segment_;
    const u32 found = s.directory(index_, source).load();
    if (found == 0) return 0;
    RingControl& c = s.ring(found - 1);
    const char* data = s.ring_data(found - 1);
    const u64 mask = s.ring_bytes() - 1;
    const u64 begin = c.head.load(std::memory_order_relaxed);
    const u64 tail = c.tail.load();
    u64 head = begin, taken = 0;
    while (head != tail) {
        const char* at = data + (head & mask);
        Frame frame;
        memcpy(&frame, at, 8);
        if (frame.flags & kFramePad) {
            head += frame.length;
            continue;
        }
        if (taken == limit) break;
        memcpy(&frame, at, sizeof frame);
        if (only_src != 0 && frame.src != only_src) break;
        const char* payload = at + sizeof frame;
        u64 bytes = frame.length - sizeof frame;
        // RING-2: for a predecessor of this lane? (The link's frames for other nodes are never.)
        const u32 incarnation = address_incarnation(frame.dest);
        const bool ours = incarnation == 0 || address_node(frame.dest) != s.node() || frame.dest == address_;
        if (frame.flags & kFrameObject) {
            u64 handle;
            memcpy(&handle, payload, sizeof handle);
            if (ours) {
                payload = store_.pin(handle, bytes);
                if (payload != nullptr) {
                    const bool ok = sink.take(frame.src, frame.dest, payload, bytes);
                    store_.unpin(handle);
                    if (!ok) break;
                    taken++;
                } else {
                    lost_++;  // its sender died and was reclaimed in between
                }
            }
            store_.remove(handle);  // before head moves: killed here, reclaim finds the frame and removes it
        } else if (ours) {
            if (!sink.take(frame.src, frame.dest, payload, bytes)) break;
            taken++;
        }
        head += frame_space(frame.length);
    }
    left = head != tail;
    if (head != begin) c.head.store(head);                           // LANE-3: head,
    if (c.want_space.load() != 0 && c.want_space.exchange(0) != 0) notify(source);  // then want_space
    if (!left && c.closed.load() != 0) {
        Segment::Lock lock(s);  // RING-3; look again, a successor may have taken it over
        if (s.directory(index_, source).load() == found && c.closed.load() != 0 && c.tail.load() == head)
            ring_release(s, index_, source);
    }
    return taken;
}

// A source's bit also says "there is space again" and "I am dead": look after the way to it.
void Lane::serve_source(u32 source) {
    std::lock_guard<std::mutex> guard(out_mutex_);
    Outbound* out = outbound_[source].get();
    if (out && (!out->backlog.empty() || lane_state(segment_->lane(source).word.load()) != kLaneOpen)) flush_to(source);
}

// ---- waiting -----------------------------------------------------------------------------------------------------

bool Turn::try_take() {
    std::lock_guard<std::mutex> guard(mutex_);
    if (taken_) return false;
    return taken_ = true;
}

bool Turn::take(i64 deadline_ns) {
    std::unique_lock<std::mutex> guard(mutex_);
    auto is_free = [this] { return !taken_; };
    waiting_++;
    bool free = true;
    if (deadline_ns == kNever)
        given_.wait(guard, is_free);
    else
        free = given_.wait_for(guard, std::chrono::nanoseconds(std::max<i64>(0, deadline_ns - monotonic_ns())), is_free);
    waiting_--;
    if (free) taken_ = true;
    return free;
}

void Turn::give() {
    std::lock_guard<std::mutex> guard(mutex_);
    taken_ = false;
    if (waiting_ > 0) given_.notify_one();
}

bool Lane::try_enter_foreground() { return turn_.try_take(); }

bool Lane::enter_foreground(i64 deadline_ns) { return turn_.take(deadline_ns); }

void Lane::leave_foreground() {  // LANE-4: the bit, then the rings
    foreground_thread_.store(thread_id(), std::memory_order_relaxed);
    if (resting_.load(std::memory_order_relaxed)) entry_.alone_since.store(monotonic_ns(), std::memory_order_relaxed);
    u32 before = entry_.waiter.load(std::memory_order_relaxed);
    if (before & (kForegroundActive | kForegroundParked)) {
        before = entry_.waiter.fetch_and(~u32(kForegroundActive | kForegroundParked));
        if ((before & kBackgroundParked) && any_ready()) wake_entry(entry_);
    }
    turn_.give();
}

i64 Lane::park_until(i64 deadline_ns) {
    if (!starved_.load()) return deadline_ns;
    return std::min(deadline_ns, monotonic_ns() + kStarved);
}

Wait Lane::wait_foreground(i64 deadline_ns, bool spin) {
    entry_.waiter.fetch_or(kForegroundActive);
    if (resting_.load(std::memory_order_relaxed)) entry_.alone_since.store(0, std::memory_order_relaxed);
    const i64 start = monotonic_ns();
    auto look = [&](Wait& result) {
        if (closed_.load()) return result = Wait::kClosed, true;
        if (any_ready()) return result = Wait::kReady, true;
        if (fg_wake_.load() && fg_wake_.exchange(false)) return result = Wait::kWoken, true;
        return false;
    };
    Wait result;
    if (look(result)) return result;
    i64 limit = spin_ns_;
    if (limit == 0 && ++unspun_ >= kSpinAgain) limit = spin_limit_;
    if (spin && limit != 0) {
        unspun_ = 0;
        const i64 end = std::min(start + limit, deadline_ns);
        for (u32 round = 1;; round++) {
            for (int i = 0; i < 32; i++) {
                pause_cpu();
                if (look(result)) {
                    spins_.fetch_add(1, std::memory_order_relaxed);
                    missed_ = 0;
                    spin_ns_ = std::min(spin_limit_, std::max(spin_ns_, 4 * (monotonic_ns() - start) + 10'000));
                    return result;
                }
            }
            if (monotonic_ns() >= end) break;
            if (round % 4 == 0) sched_yield();  // on one core the sender needs it
        }
        if (end != deadline_ns && ++missed_ >= kSpinMissed) spin_ns_ = 0;
    }
    for (;;) {
        const u32 seen = entry_.fg_word.load();
        entry_.waiter.fetch_or(kForegroundParked);  // LANE-4: the bit, then the rings
        int rc = 0;
        if (!look(result)) {
            i64 until = park_until(deadline_ns);
            if (is_main_thread()) until = std::min(until, monotonic_ns() + kSignalSlice);
            parks_.fetch_add(1, std::memory_order_relaxed);
            rc = futex_wait(entry_.fg_word, seen, until);
            entry_.waiter.fetch_and(~u32(kForegroundParked));
            if (!look(result)) {
                if (monotonic_ns() >= deadline_ns) return Wait::kTimeout;
                // A signal may come between Python's last look and the futex; the slice bounds that (see the test
                // test_signal_is_seen).
                if (starved_.load()) flush();
                if (rc == EINTR || (rc == ETIMEDOUT && is_main_thread())) return Wait::kInterrupted;
                continue;
            }
        } else {
            entry_.waiter.fetch_and(~u32(kForegroundParked));
        }
        return result;
    }
}

void Lane::tick(u32 seen, i64 end_ns) {
    if (backlog_bytes_.load() != 0) {
        tick_with_backlog(seen, end_ns);
    } else if (tick_ns_ <= kLongTick) {
        futex_wait(entry_.bg_word, seen, end_ns);
    } else {  // a rest, which senders may end
        resting_.store(true, std::memory_order_relaxed);
        if (!(entry_.waiter.load() & kForegroundActive)) entry_.alone_since.store(monotonic_ns(), std::memory_order_relaxed);
        const int rc = futex_wait(entry_.bg_word, seen, end_ns);
        resting_.store(false, std::memory_order_relaxed);
        entry_.alone_since.store(0, std::memory_order_relaxed);
        hurried_ = rc == 0 || rc == EAGAIN;
    }
}

// A tick in which "there is space" wakes: moving a backlog needs neither the GIL nor the foreground's leave.
void Lane::tick_with_backlog(u32 seen, i64 end_ns) {
    for (;;) {
        entry_.waiter.fetch_or(kBackgroundParked);
        if (flush() == 0) break;
        int rc = futex_wait(entry_.bg_word, seen, end_ns);
        if (rc == ETIMEDOUT || bg_wake_.load() || closed_.load()) break;
        seen = entry_.bg_word.load();
    }
    entry_.waiter.fetch_and(~u32(kBackgroundParked));
}

Wait Lane::wait_background(i64 deadline_ns) {
    for (;;) {
        if (closed_.load()) return Wait::kClosed;
        if (bg_wake_.load() && bg_wake_.exchange(false)) return Wait::kWoken;
        const i64 now = monotonic_ns();
        if (now >= deadline_ns) return Wait::kTimeout;
        if (starved_.load()) flush();
        const u32 seen = entry_.bg_word.load();
        const bool ready = any_ready();
        const bool active = entry_.waiter.load() & kForegroundActive;
        if (eager.load(std::memory_order_relaxed) > 0) {
            if (ready && !active) return Wait::kReady;
        } else {
            const u64 drains = foreground_drains_.load() - drains_seen_;
            const i64 before = std::exchange(rested_ns_, 0);  // the tick to go back to
            const bool hurried = std::exchange(hurried_, false);
            if (hurried || drains) {
                if (hurried) {  // somebody sends to who has left long ago: one short look, and then as before if that was the kernel's doing
                    rested_ns_ = tick_ns_;
                    tick_ns_ = kTick;
                } else {
                    tick_ns_ = before ? before : std::min(2 * tick_ns_, drains < kManyDrains ? kLongTick : kLongestTick);
                }
                drains_seen_ += drains;
                if (drains) drained_ns_ = now;  // however often it is hurried, patience has its end
                worked_ns_ = thread_work_ns(foreground_thread_.load(std::memory_order_relaxed));
            } else if (now - drained_ns_ >= kTick && (active || ready)) {
                if (!active && !foreground_waits_for_core(now)) {
                    drained_ns_ = now;
                    return Wait::kReady;
                }
                tick_ns_ = before ? before : std::min(2 * tick_ns_, kLongestTick);
            } else {
                tick_ns_ = kTick;
            }
            if (ready || drained_ns_ == now) background_active_ns_ = now;  // something moves
            if (now - background_active_ns_ < kBackgroundPatience) {
                ticks_.fetch_add(1, std::memory_order_relaxed);
                tick(seen, std::min(now + tick_ns_, deadline_ns));
                continue;
            }
        }
        entry_.waiter.fetch_or(kBackgroundParked);  // LANE-4
        if ((any_ready() && !(entry_.waiter.load() & kForegroundActive)) || bg_wake_.load() || closed_.load()) {
            entry_.waiter.fetch_and(~u32(kBackgroundParked));
            background_active_ns_ = monotonic_ns();
            continue;
        }
        int rc = futex_wait(entry_.bg_word, seen, park_until(deadline_ns));
        entry_.waiter.fetch_and(~u32(kBackgroundParked));
        drained_ns_ = monotonic_ns();
        tick_ns_ = kTick;
        if (rc == 0 || rc == EAGAIN) background_active_ns_ = drained_ns_;
    }
}

// It would drain, but others have the cores: taking over would take them from it, too.
bool Lane::foreground_waits_for_core(i64 now) const {
    const int thread = foreground_thread_.load(std::memory_order_relaxed);
    return now - drained_ns_ < kNoMorePatience && thread_work_ns(thread) - worked_ns_ < kInUserCode && thread_is_runnable(thread);
}

void Lane::wake() {
    if (!same_process()) check();
    fg_wake_ = true;
    if (entry_.waiter.load() & kForegroundParked) {
        entry_.waiter.fetch_and(~u32(kForegroundParked));
        futex_wake(entry_.fg_word);
    }
}

void Lane::wake_background() {
    if (!same_process()) check();
    bg_wake_ = true;
    futex_wake(entry_.bg_word);
}

LaneStatistics Lane::statistics() {
    std::lock_guard<std::mutex> in(in_mutex_);
    std::lock_guard<std::mutex> out(out_mutex_);
    return {sent_, received_, backlog_bytes_.load(), backlogged_, dropped_, lost_,
            parks_.load(), spins_.load(), wakes_.load(), ticks_.load()};
}

}  // namespace hpc
