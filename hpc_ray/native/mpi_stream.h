// mpi_stream: frames from the lanes of one node to those of others, as messages of MPI.
//
// Messages to a peer are one stream of frames (frames.h), cut into chunks wherever it happens; so coalescing and splitting are the same
// thing. Chunks go out by synchronous sends, which complete when the receiver has matched them: `window` unfinished ones per peer are
// the whole flow control, and bound what MPI ever has to buffer. Receives are a ring of preposted buffers for any source.
//
// The MPI in this process is whichever mpi4py has loaded, so its functions come as addresses and its handles as the integers that they
// are: this is compiled without it, once for all of them. What fails is kept for the caller, who knows MPI's error classes.
//
// MPI-1 (no probe): every message meets a posted receive, or waits as one of `window` per peer.
// MPI-2 (order): receives of the ring are looked at in the order they were posted, so a peer's chunks are too. Those that have been
//   used are posted again by the next look: whom a message was for comes first.
// MPI-3 (progress): each look tests the receive at the head of the ring, which drives MPI's progress engine; without that neither data
//   nor news of failures move.
//
// When to ring a peer's bell is said in transport/bells.py (BELLS-1, BELLS-2).
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "lane.h"

namespace hpc {

struct Mpi {
    using Handle = std::uintptr_t;  // an int or a pointer, by the library: both are passed in a register
    int (*issend)(const void* data, int count, Handle type, int rank, int tag, Handle comm, void* request);
    int (*irecv)(void* data, int count, Handle type, int rank, int tag, Handle comm, void* request);
    int (*test)(void* request, int* done, void* status);
    int (*wait)(void* request, void* status);
    int (*cancel)(void* request);
    int (*request_free)(void* request);
    int (*get_count)(const void* status, Handle type, int* count);
    Handle comm, byte, request_null;
    u64 request_bytes, status_bytes;
    u64 source_at;  // where in a status its source is
    int any_source;
};

class MpiStream {
  public:
    struct Shape {
        u64 chunk_bytes;
        u32 slots;   // of the ring
        u32 window;  // unfinished sends to one peer
        int tag;
        i64 quiet_ns;  // without a message to or from a peer for so long: ring first
    };
    struct Message {  // that is for no lane of this node
        u32 node;     // that it came from
        u64 src, dest;
        std::string payload;
    };
    struct Failure {
        int node;  // -1: of a receive, so of anybody
        int code;
    };
    using Ring = std::function<void(u32 node)>;  // may be empty

    // `ranks[i]` is the rank of node i's link. Posts the ring.
    MpiStream(const Mpi& mpi, std::vector<int> ranks, u32 node, const Shape& shape, Ring ring);
    MpiStream(const MpiStream&) = delete;

    // Queues frames; they leave with the next turn. Dropped if the peer is lost.
    void queue(u32 node, const void* frames, u64 bytes);
    // One look, and more of them until `until` as long as nothing moves, between which others may have the core. Takes what `inbox` has
    // for other nodes along and delivers to lanes of `local`; each may be null. `slept`: MPI may have taken what is found at any
    // time since the last look. Whether anything moved.
    bool turn(Lane* inbox, Lane* local, i64 until, bool slept, std::vector<Message>& others, std::vector<Failure>& failures);
    // What an inbox has for this node is dropped from now on.
    void forsake(u32 node) { peers_.at(node).forsaken = true; }
    // The same, and what is queued for it goes.
    void lose(u32 node);
    // Cancels the ring.
    void close();

    u64 arrived() const { return arrived_; }  // bytes in the last turn
    u64 queued() const { return queued_; }    // bytes that wait for room
    bool sending() const { return !sending_.empty(); }
    i64 looked() const { return looked_; }  // when; the same clock as monotonic_ns
    i64 moved() const { return moved_; }
    void has_moved() { moved_ = monotonic_ns(); }

  private:
    struct Request {
        alignas(8) char handle[8];
    };
    struct Send {
        Request request;
        std::string chunk;
    };
    struct Slot {
        Request request;
        std::unique_ptr<char[]> data;
    };
    struct Peer {
        u32 node;
        int rank;
        bool lost = false, forsaken = false, listed = false;
        i64 last = 0;        // when we sent it something or received something of it, at the earliest (BELLS-1)
        i64 ring_at = 0;     // when it shall be woken, if it has not taken the first of `sends` by then (BELLS-2)
        i64 patience = 0;    // and how long to wait after that
        std::string out;     // the stream, from `begin`
        u64 begin = 0;
        std::deque<Send> sends;
        std::string partial;  // start of a frame whose rest comes with the next chunk
        u64 waiting() const { return out.size() - begin; }
    };
    class Inbox;

    void queue_for(Peer& peer);
    bool push(std::vector<Failure>& failures);
    bool push_to(Peer& peer, std::vector<Failure>& failures);
    void next_chunk(Peer& peer, std::string& chunk);
    i64 ring_if_quiet(Peer& peer);
    bool pull(Lane* local, std::vector<Message>& others, std::vector<Failure>& failures);
    void take(Peer& peer, const char* data, u64 bytes, Lane* local, std::vector<Message>& others);
    void post(std::vector<Failure>& failures);
    bool is_null(const Request& request) const;

    const Mpi mpi_;
    const u32 node_;
    const Shape shape_;
    const Ring ring_;
    std::vector<Peer> peers_;
    std::vector<Peer*> by_rank_;
    std::vector<Peer*> sending_;  // have something queued or unfinished
    std::deque<Slot> posted_, used_;
    std::vector<std::string> spare_;  // memory of chunks that are out
    std::vector<std::deque<Send>> abandoned_;  // MPI may still read from it
    std::vector<char> status_;
    u64 queued_ = 0, arrived_ = 0;
    i64 looked_, moved_;
    i64 since_;  // since when MPI may have taken what is found now
};

}  // namespace hpc
