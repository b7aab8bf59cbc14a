// check: the few lines these tests need of a test library.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <string>
#include <vector>

#include "../lane.h"
#include "../reclaim.h"

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;  // it knows nothing of processes that share memory
#else
constexpr bool kThreadSanitizer = false;
#endif

#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            fprintf(stderr, "%s:%d: CHECK failed: %s\n", __FILE__, __LINE__, #condition);       \
            fflush(stderr);                                                                     \
            abort();                                                                            \
        }                                                                                       \
    } while (0)

#define CHECK_THROWS(type, expression)  \
    do {                                \
        bool thrown = false;            \
        try {                           \
            (void)(expression);         \
        } catch (const type&) {         \
            thrown = true;              \
        }                               \
        CHECK(thrown);                  \
    } while (0)

struct Test {
    const char* name;
    std::function<void()> body;
};
inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}
struct Register {
    Register(const char* name, std::function<void()> body) { tests().push_back({name, std::move(body)}); }
};
#define TEST(name)                                  \
    static void name();                             \
    static Register register_##name(#name, name);   \
    static void name()

#define RUN_TESTS()                                                          \
    int main(int argc, char** argv) {                                        \
        for (const Test& test : tests()) {                                   \
            if (argc > 1 && std::string(argv[1]) != test.name) continue;     \
            hpc::i64 start = hpc::monotonic_ns();                            \
            printf("%s ... ", test.name);                                    \
            fflush(stdout);                                                  \
            test.body();                                                     \
            printf("ok, %.1f ms\n", double(hpc::monotonic_ns() - start) / 1e6); \
        }                                                                    \
    }

// Runs `body` in a child process; its exit status.
inline int in_child(const std::function<void()>& body) {
    fflush(stdout);
    pid_t pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        body();
        _exit(0);
    }
    int status;
    CHECK(waitpid(pid, &status, 0) == pid);
    return status;
}

struct Received {
    hpc::u64 src, dest;
    std::string payload;
};
struct Inbox final : hpc::FrameSink {
    std::vector<Received> frames;
    bool take(hpc::u64 src, hpc::u64 dest, const char* payload, hpc::u64 bytes) override {
        frames.push_back({src, dest, std::string(payload, bytes)});
        return true;
    }
};
inline std::vector<Received> drain(hpc::Lane& lane, hpc::u64 limit = 1000000) {
    Inbox inbox;
    lane.drain(inbox, limit, true);
    return std::move(inbox.frames);
}
// The foreground's receive as bind.cpp does it.
inline std::vector<Received> receive(hpc::Lane& lane, double timeout_s, bool spin = true, hpc::u64 limit = 256) {
    hpc::i64 deadline = hpc::monotonic_ns() + hpc::i64(timeout_s * 1e9);
    if (!lane.enter_foreground(deadline)) return {};
    Inbox inbox;
    lane.drain(inbox, limit, true);
    while (inbox.frames.empty()) {
        hpc::Wait outcome = lane.wait_foreground(deadline, spin);
        if (outcome == hpc::Wait::kInterrupted) continue;
        if (outcome != hpc::Wait::kReady) break;
        lane.drain(inbox, limit, true);
    }
    lane.leave_foreground();
    return std::move(inbox.frames);
}
inline hpc::i64 send(hpc::Lane& lane, hpc::u64 dest, const std::string& payload) {
    return lane.send(dest, payload.data(), payload.size());
}
inline void check_valid(hpc::Segment& segment) {
    for (const std::string& problem : segment.validate()) {
        fprintf(stderr, "invalid: %s\n", problem.c_str());
        CHECK(!"segment is valid");
    }
}
inline void check_empty(hpc::Segment& segment) {
    check_valid(segment);
    hpc::SegmentStatistics s = segment.statistics();
    CHECK(s.rings_used == 0);
    CHECK(s.slots_used == 0);
    CHECK(s.heap_used_bytes == 0);
    CHECK(s.lanes_open == 0 && s.lanes_dead == 0);
}
inline std::shared_ptr<hpc::Segment> make_segment(hpc::u32 ring_bytes = 65536, hpc::u64 arena_bytes = 64u << 20,
                                                  hpc::u32 node = 7, hpc::u32 max_lanes = 1024) {
    hpc::SegmentOptions options;
    options.node = node;
    options.arena_bytes = arena_bytes;
    options.ring_bytes = ring_bytes;
    options.max_lanes = max_lanes;
    return hpc::Segment::create(options);
}
