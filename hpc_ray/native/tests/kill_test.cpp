// kill: processes that do everything the core offers are killed by SIGKILL at random instants, thousands of times.
//
// Three parts. The supervisor (this process) forks writers, kills them, marks them dead and reclaims them, or lets a
// reclaimer do so that is killed as well. The reader lives all the time, checks what arrives and answers. Each writer
// opens lanes, sends small and large frames to both, receives, and creates, seals, pins and deletes objects.
//
// Promised, and checked here: no frame is damaged, lost or out of order up to the sender's death; nobody waits longer
// than a bound for something the living do; in the end every ring, slot and byte is free (LAYOUT-1, RING-1, HEAP-1,
// STORE-1, STORE-2, LANE-5, RECLAIM-2, RECLAIM-3).
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include <algorithm>
#include <map>
#include <random>

#include "check.h"

using namespace hpc;

namespace {

constexpr u32 kNode = 4, kReader = 2, kSupervisor = 3;
constexpr u64 kStop = ~u64(0), kEcho = u64(1) << 63;

struct Shared {  // outside the segment: what the test itself knows
    std::atomic<u64> started;   // rounds whose writer got going
    std::atomic<u64> frames, large, damaged, gaps;
    std::atomic<u64> objects[64];  // handles that writers may pin and delete
};
Shared* g_shared;

struct Head {
    u64 sequence;
    u64 seed;
};

std::string make_payload(u64 sequence, u64 seed, u64 bytes) {
    std::string payload(sizeof(Head) + bytes, 0);
    Head head{sequence, seed};
    memcpy(&payload[0], &head, sizeof head);
    for (u64 i = 0; i < bytes; i++) payload[sizeof head + i] = char(seed * 131 + i * 7);
    return payload;
}

bool intact(const std::string& payload, Head& head) {
    if (payload.size() < sizeof head) return false;
    memcpy(&head, payload.data(), sizeof head);
    for (u64 i = 0; i + sizeof head < payload.size(); i++)
        if (payload[sizeof head + i] != char(head.seed * 131 + i * 7)) return false;
    return true;
}

std::map<u64, u64> g_expected;

void check_frame(const Received& frame) {
    Head head;
    g_shared->frames++;
    if (frame.payload.size() > 2000) g_shared->large++;
    if (!intact(frame.payload, head)) g_shared->damaged++;
    u64 sequence = head.sequence & ~kEcho;
    if (sequence != g_expected[frame.src]++) {
        g_shared->gaps++;
        fprintf(stderr, "from %llx: %llu instead of %llu\n", (unsigned long long)frame.src, (unsigned long long)sequence,
                (unsigned long long)(g_expected[frame.src] - 1));
    }
}

void reader(std::shared_ptr<Segment> segment) {
    auto lane = Lane::open(segment, kReader);
    std::map<u64, u64> sequence_to;
    for (;;) {
        for (Received& frame : receive(*lane, 0.2, true)) {
            Head head;
            memcpy(&head, frame.payload.data(), std::min(sizeof head, frame.payload.size()));
            if (head.sequence == kStop) {
                lane->close(1);
                _exit(0);
            }
            check_frame(frame);
            if (head.sequence & kEcho) {
                try {
                    send(*lane, frame.src, make_payload(sequence_to[frame.src]++, head.seed, frame.payload.size() % 3000));
                } catch (const ArenaFull&) {
                    sequence_to[frame.src]--;
                }
            }
        }
    }
}

[[noreturn]] void writer(std::shared_ptr<Segment> segment, u64 seed) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    g_expected.clear();
    std::mt19937_64 random(seed);
    auto lane = Lane::open(segment, -1);
    g_shared->started++;
    const u64 to[2] = {make_address(kNode, kReader, 0), make_address(kNode, kSupervisor, 0)};
    u64 sequence[2] = {0, 0};
    Store& store = lane->store();
    std::vector<u64> pins;
    char id[kObjectIdBytes] = {};
    for (;;) {
        try {
            u64 size;
            switch (random() % 12) {
                case 0: case 1: case 2: case 3: {
                    u64 who = random() % 8 == 0 ? 1 : 0;
                    bool large = random() % 10 == 0;
                    u64 echo = random() % 4 == 0 ? kEcho : 0;
                    std::string payload = make_payload(sequence[who] | echo, random(), large ? 1100 + random() % 4000 : random() % 300);
                    send(*lane, to[who], payload);
                    sequence[who]++;
                    break;
                }
                case 4:
                    for (Received& frame : drain(*lane)) check_frame(frame);
                    break;
                case 5: case 6: {
                    u64 owner = random() % 3 == 0 ? lane->address() : random() % 2 ? segment->lanes()[0].address : 0;
                    u64 handle = store.create(id, random() % 5000, owner);
                    char* data = store.write_address(handle, size);
                    memset(data, 1, size);
                    if (random() % 8 == 0) {
                        store.abort(handle);
                        break;
                    }
                    store.seal(handle);
                    if (random() % 3 == 0) store.claim(handle);
                    u64 old = g_shared->objects[random() % 64].exchange(handle);
                    store.remove(old);
                    break;
                }
                case 7: case 8: {
                    u64 handle = g_shared->objects[random() % 64].load();
                    if (store.pin(handle, size)) pins.push_back(handle);
                    break;
                }
                case 9:
                    if (pins.empty()) break;
                    store.unpin(pins.back());
                    pins.pop_back();
                    break;
                case 10:
                    if (random() % 2) store.spill(g_shared->objects[random() % 64].load());
                    store.remove(g_shared->objects[random() % 64].load());
                    break;
                case 11:
                    if (random() % 4 == 0) {  // a second lane comes and goes
                        auto other = Lane::open(segment, -1);
                        send(*other, lane->address(), make_payload(0, 5, 10));
                        if (random() % 2)
                            for (Received& frame : receive(*lane, 0.0001, false)) check_frame(frame);
                        other->close(0);
                    } else if (random() % 4 == 0) {
                        for (Received& frame : receive(*lane, 0.0002, random() % 2)) check_frame(frame);
                    }
                    break;
            }
        } catch (const ArenaFull&) {
            for (u64 handle : pins) store.unpin(handle);
            pins.clear();
            for (auto& object : g_shared->objects) store.remove(object.load());
        }
    }
}

void pause_us(u64 us) {
    for (i64 end = monotonic_ns() + i64(us) * 1000; monotonic_ns() < end;) {
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (kThreadSanitizer) return 77;
    const u64 rounds = argc > 1 ? strtoull(argv[1], nullptr, 10) : 2000;
    const u64 seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : u64(monotonic_ns());
    printf("%llu kills, seed %llu\n", (unsigned long long)rounds, (unsigned long long)seed);
    fflush(stdout);
    g_shared = static_cast<Shared*>(mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    std::mt19937_64 random(seed);
    auto segment = make_segment(4096, 2 << 20, kNode, 64);
    pid_t reading = fork();
    if (reading == 0) reader(segment);
    auto lane = Lane::open(segment, kSupervisor);
    const u64 to_reader = make_address(kNode, kReader, 0);
    u64 sequence = 0;
    i64 longest = 0, begin = monotonic_ns();
    u64 killed_reclaimers = 0;

    for (u64 round = 0; round < rounds; round++) {
        u64 before = g_shared->started.load();
        pid_t pid = fork();
        CHECK(pid >= 0);
        if (pid == 0) writer(segment, random());
        if (random() % 8 != 0)  // otherwise: also killed while it starts
            while (g_shared->started.load() == before) sched_yield();
        pause_us(random() % 500);
        CHECK(kill(pid, SIGKILL) == 0);
        int status;
        CHECK(waitpid(pid, &status, 0) == pid);
        if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGKILL) {
            fprintf(stderr, "the writer of round %llu ended by itself: %x\n", (unsigned long long)round, status);
            return 1;
        }
        i64 dead_at = monotonic_ns();
        for (const LaneRecord& record : segment->lanes()) {
            if (record.pid != u32(pid)) continue;
            segment->mark_dead(record.address);
            if (random() % 4 == 0) {  // RECLAIM-2
                pid_t reclaimer = fork();
                if (reclaimer == 0) {
                    reclaim(*segment, record.address);
                    _exit(0);
                }
                pause_us(random() % 300);
                kill(reclaimer, SIGKILL);
                CHECK(waitpid(reclaimer, &status, 0) == reclaimer);
                killed_reclaimers += WIFSIGNALED(status);
            }
            for (const Unclaimed& object : reclaim(*segment, record.address)) lane->store().remove(object.handle);
            CHECK(!segment->alive(record.address));
        }
        // The living get on: the reader answers, memory can be had.
        std::string payload = make_payload(sequence++ | kEcho, random(), random() % 2000);
        CHECK(send(*lane, to_reader, payload) >= 0);
        for (bool answered = false; !answered;) {
            auto frames = receive(*lane, 5, true);
            CHECK(!frames.empty());
            for (Received& frame : frames) {
                check_frame(frame);
                answered = answered || address_index(frame.src) == kReader;
            }
        }
        longest = std::max(longest, monotonic_ns() - dead_at);
        if (round % 16 == 0) {
            for (const ObjectRecord& object : lane->store().list()) lane->store().remove(object.handle);
            CHECK(lane->store().statistics().pinned == 0);
        }
        if (round % 256 == 0) check_valid(*segment);
    }

    double seconds = double(monotonic_ns() - begin) / 1e9;
    // A last look at frames that wait for this process, then everything must be free.
    for (Received& frame : receive(*lane, 0.05, false)) check_frame(frame);
    send(*lane, to_reader, make_payload(kStop, 0, 0));
    int status;
    CHECK(waitpid(reading, &status, 0) == reading);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    for (const ObjectRecord& object : lane->store().list()) lane->store().remove(object.handle);
    u64 repairs = segment->statistics().repairs;
    lane->close(1);
    printf("%.1f s, %llu writers got going, %llu frames (%llu large), %llu mutex repairs, %llu reclaimers killed, longest "
           "wait of the living %.1f ms\n",
           seconds, (unsigned long long)g_shared->started.load(), (unsigned long long)g_shared->frames.load(),
           (unsigned long long)g_shared->large.load(), (unsigned long long)repairs,
           (unsigned long long)killed_reclaimers, double(longest) / 1e6);
    CHECK(g_shared->damaged == 0);
    CHECK(g_shared->gaps == 0);
    CHECK(longest < 2'000'000'000);
    check_empty(*segment);
    return 0;
}
