#include "mpi_stream.h"

#include <sched.h>
#include <string.h>

#include <algorithm>
#include <stdexcept>

#include "frames.h"

namespace hpc {

namespace {

constexpr u64 kFrames = 256;    // of an inbox at a time
constexpr std::size_t kSpare = 8;

}  // namespace

MpiStream::MpiStream(const Mpi& mpi, std::vector<int> ranks, u32 node, const Shape& shape, Ring ring)
    : mpi_(mpi), node_(node), shape_(shape), ring_(std::move(ring)), peers_(ranks.size()), status_(mpi.status_bytes + 64) {
    if (mpi.request_bytes > sizeof(Request)) throw std::invalid_argument("this MPI's requests are larger than a pointer");
    looked_ = since_ = moved_ = monotonic_ns();
    for (u32 i = 0; i < ranks.size(); i++) {
        peers_[i].node = i;
        peers_[i].rank = ranks[i];
        if (ranks[i] >= int(by_rank_.size())) by_rank_.resize(std::size_t(ranks[i]) + 1);
        by_rank_[std::size_t(ranks[i])] = &peers_[i];
    }
    if (ranks.size() > 1)
        for (u32 i = 0; i < shape_.slots; i++) used_.push_back({{}, std::unique_ptr<char[]>(new char[shape_.chunk_bytes])});
    std::vector<Failure> failures;
    post(failures);
    if (!failures.empty()) throw std::runtime_error("MPI_Irecv failed with code " + std::to_string(failures[0].code));
}

bool MpiStream::is_null(const Request& request) const { return memcmp(request.handle, &mpi_.request_null, mpi_.request_bytes) == 0; }

// ---- messages out ------------------------------------------------------------------------------------------------

void MpiStream::queue_for(Peer& peer) {
    if (peer.listed) return;
    peer.listed = true;
    sending_.push_back(&peer);
}

void MpiStream::queue(u32 node, const void* frames, u64 bytes) {
    Peer& peer = peers_.at(node);
    if (peer.lost || bytes == 0) return;
    peer.out.append(static_cast<const char*>(frames), bytes);
    queued_ += bytes;
    queue_for(peer);
}

// Frames of the lane, each to where it belongs.
class MpiStream::Inbox final : public FrameSink {
  public:
    Inbox(MpiStream& stream, std::vector<Message>& others) : stream_(stream), others_(others) {}
    bool take(u64 src, u64 dest, const char* payload, u64 bytes) override {
        const u32 node = address_node(dest);
        try {
            if (node == stream_.node_)
                others_.push_back({node, src, dest, std::string(payload, bytes)});
            else if (node < stream_.peers_.size())
                send(stream_.peers_[node], src, dest, payload, bytes);
        } catch (const std::bad_alloc&) {
            return false;  // it stays where it is
        }
        return true;
    }

  private:
    void send(Peer& peer, u64 src, u64 dest, const char* payload, u64 bytes) {
        if (peer.lost || peer.forsaken) return;
        stream_.queue_for(peer);
        append_frame(peer.out, src, dest, payload, bytes);
        stream_.queued_ += kFrameHeadBytes + bytes;
    }
    MpiStream& stream_;
    std::vector<Message>& others_;
};

void MpiStream::next_chunk(Peer& peer, std::string& chunk) {
    const u64 size = std::min(peer.waiting(), shape_.chunk_bytes);
    if (!spare_.empty()) {
        chunk.swap(spare_.back());
        spare_.pop_back();
    }
    chunk.clear();
    if (size == peer.out.size()) {
        chunk.swap(peer.out);
    } else {
        chunk.assign(peer.out, peer.begin, size);
        peer.begin += size;
        if (peer.begin == peer.out.size() || peer.begin > std::max(peer.out.size() / 2, shape_.chunk_bytes)) {
            peer.out.erase(0, peer.begin);
            peer.begin = 0;
        }
    }
    queued_ -= size;
}

// The time. Rings if nothing has been exchanged for a while.
i64 MpiStream::ring_if_quiet(Peer& peer) {
    const i64 now = monotonic_ns();
    if (ring_ && now - peer.last > shape_.quiet_ns) {
        ring_(peer.node);
        peer.last = now;
    }
    return now;
}

bool MpiStream::push(std::vector<Failure>& failures) {
    bool moved = false;
    for (std::size_t i = 0; i < sending_.size();) {
        Peer& peer = *sending_[i];
        moved |= push_to(peer, failures);
        if (peer.waiting() == 0 && peer.sends.empty()) {
            peer.listed = false;
            sending_[i] = sending_.back();
            sending_.pop_back();
        } else {
            i++;
        }
    }
    return moved;
}

bool MpiStream::push_to(Peer& peer, std::vector<Failure>& failures) {
    const i64 lively = 2 * shape_.quiet_ns;
    const std::size_t before = peer.sends.size();
    while (!peer.sends.empty()) {
        int done = 0;
        if (int code = mpi_.test(peer.sends.front().request.handle, &done, status_.data())) {
            failures.push_back({int(peer.node), code});
            return false;
        }
        if (!done) break;
        if (spare_.size() < kSpare) spare_.push_back(std::move(peer.sends.front().chunk));
        peer.sends.pop_front();
    }
    bool moved = peer.sends.size() < before;
    if (moved) {
        peer.patience = lively;
        peer.ring_at = looked_ + lively;
    } else if (before != 0 && looked_ > peer.ring_at) {  // it may have gone to sleep while our message was under way (BELLS-2)
        if (ring_) ring_(peer.node);
        peer.patience *= 2;  // more and more rarely, for it may be just slow
        peer.ring_at = looked_ + peer.patience;
    }
    while (peer.waiting() != 0 && peer.sends.size() < shape_.window) {
        const i64 now = ring_if_quiet(peer);
        if (peer.sends.empty()) {
            peer.patience = lively;
            peer.ring_at = looked_ + lively;
        }
        peer.sends.emplace_back();
        Send& send = peer.sends.back();
        next_chunk(peer, send.chunk);
        if (int code = mpi_.issend(send.chunk.data(), int(send.chunk.size()), mpi_.byte, peer.rank, shape_.tag, mpi_.comm,
                                   send.request.handle)) {
            peer.sends.pop_back();
            failures.push_back({int(peer.node), code});
            return moved;
        }
        ring_if_quiet(peer);  // somebody else may have had our core since
        peer.last = std::max(peer.last, now);
        moved = true;
    }
    return moved;
}

// ---- messages in -------------------------------------------------------------------------------------------------

void MpiStream::post(std::vector<Failure>& failures) {
    while (!used_.empty()) {
        Slot& slot = used_.front();
        if (int code = mpi_.irecv(slot.data.get(), int(shape_.chunk_bytes), mpi_.byte, mpi_.any_source, shape_.tag, mpi_.comm,
                                  slot.request.handle)) {
            failures.push_back({-1, code});
            return;
        }
        posted_.push_back(std::move(slot));
        used_.pop_front();
    }
}

bool MpiStream::pull(Lane* local, std::vector<Message>& others, std::vector<Failure>& failures) {
    if (!used_.empty()) post(failures);
    bool moved = false;
    while (!posted_.empty()) {
        int done = 0, bytes = 0, source = 0;
        const int code = mpi_.test(posted_.front().request.handle, &done, status_.data());
        if (code != 0) {
            failures.push_back({-1, code});
            if (!is_null(posted_.front().request)) break;
        } else if (!done) {
            break;
        }
        used_.push_back(std::move(posted_.front()));
        posted_.pop_front();
        if (code != 0) continue;  // ended by the failure
        moved = true;
        mpi_.get_count(status_.data(), mpi_.byte, &bytes);
        memcpy(&source, status_.data() + mpi_.source_at, sizeof source);
        Peer& peer = *by_rank_.at(std::size_t(source));
        peer.last = std::max(peer.last, since_);
        take(peer, used_.back().data.get(), u64(bytes), local, others);
    }
    return moved;
}

void MpiStream::take(Peer& peer, const char* data, u64 bytes, Lane* local, std::vector<Message>& others) {
    arrived_ += bytes;
    const bool continued = !peer.partial.empty();
    if (continued) {
        peer.partial.append(data, bytes);
        data = peer.partial.data();
        bytes = peer.partial.size();
    }
    u64 taken = 0;
    FrameView frame;
    while (first_frame(data + taken, bytes - taken, frame)) {
        if (local != nullptr && local->forwards(frame.dest))
            local->forward(frame.src, frame.dest, frame.payload, frame.bytes);
        else
            others.push_back({peer.node, frame.src, frame.dest, std::string(frame.payload, frame.bytes)});
        taken += kFrameHeadBytes + frame.bytes;
    }
    if (continued)
        peer.partial.erase(0, taken);
    else if (taken < bytes)
        peer.partial.assign(data + taken, bytes - taken);
}

// ---- driving -----------------------------------------------------------------------------------------------------

bool MpiStream::turn(Lane* inbox, Lane* local, i64 until, bool slept, std::vector<Message>& others,
                     std::vector<Failure>& failures) {
    arrived_ = 0;
    for (;;) {
        const i64 before = looked_;
        looked_ = monotonic_ns();
        since_ = slept ? looked_ : before;
        bool taken = false;
        if (inbox != nullptr) {
            Inbox sink(*this, others);
            taken = inbox->drain(sink, kFrames, true) != 0;
        }
        bool moved = !sending_.empty() && push(failures);  // an answer of our node does not wait for what comes next
        moved |= pull(local, others, failures);
        if (moved) moved_ = monotonic_ns();
        if (moved || taken || !failures.empty() || looked_ >= until) return moved || taken;
        slept = false;
        sched_yield();  // to whom it may carry something next
    }
}

void MpiStream::lose(u32 node) {
    Peer& peer = peers_.at(node);
    if (peer.lost) return;
    peer.lost = true;
    queued_ -= peer.waiting();
    peer.out.clear();
    peer.out.shrink_to_fit();
    peer.begin = 0;
    peer.partial.clear();
    for (Send& send : peer.sends)
        if (!is_null(send.request)) mpi_.request_free(send.request.handle);
    abandoned_.push_back(std::move(peer.sends));
    peer.sends.clear();
}

void MpiStream::close() {
    for (Slot& slot : posted_) {
        mpi_.cancel(slot.request.handle);
        mpi_.wait(slot.request.handle, status_.data());
    }
    posted_.clear();
}

}  // namespace hpc
