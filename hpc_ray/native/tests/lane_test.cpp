// lane: order, backlog, large frames, deaths, and above all that nobody sleeps through a frame.
#include <signal.h>
#include <string.h>

#include <atomic>
#include <random>
#include <thread>

#include "check.h"

using namespace hpc;

static const int kLoad = kThreadSanitizer ? 1 : 5;

TEST(frames_arrive_in_order_around_the_ring) {
    auto s = make_segment(4096);
    auto a = Lane::open(s, -1), b = Lane::open(s, -1);
    std::mt19937_64 random(2);
    u64 next_in = 0, next_out = 0;
    for (int round = 0; round < 3000; round++) {
        for (u64 n = random() % 5; n > 0; n--) {
            std::string payload(8 + random() % 900, char(next_out));
            memcpy(&payload[0], &next_out, 8);
            CHECK(send(*a, b->address(), payload) >= 0);
            next_out++;
        }
        for (Received& frame : drain(*b, random() % 7)) {
            u64 number;
            memcpy(&number, frame.payload.data(), 8);
            CHECK(number == next_in++);
            CHECK(frame.src == a->address() && frame.dest == b->address());
            for (std::size_t i = 8; i < frame.payload.size(); i++) CHECK(frame.payload[i] == char(number));
        }
    }
    for (;;) {
        auto frames = drain(*b);
        next_in += frames.size();
        if (frames.empty() && a->flush() == 0 && (frames = drain(*b)).empty()) break;
        next_in += frames.size();
    }
    CHECK(next_in == next_out);
    CHECK(send(*a, b->address(), "") == 0 && drain(*b)[0].payload.empty());
    CHECK(send(*a, a->address(), "self") == 0 && drain(*a)[0].payload == "self");
    a->close(0), b->close(0);
    check_empty(*s);
}

TEST(a_full_ring_becomes_a_backlog) {  // LANE-1
    auto s = make_segment(1024);
    auto a = Lane::open(s, -1), b = Lane::open(s, -1), c = Lane::open(s, -1);
    i64 backlog = 0;
    for (int i = 0; i < 100; i++) backlog = send(*a, b->address(), std::string(100, char(i)));
    CHECK(backlog > 5000);
    CHECK(send(*a, c->address(), "other ways are free") == 0);
    int got = 0;
    while (got < 100) {
        auto frames = drain(*b);
        CHECK(!frames.empty());
        for (Received& frame : frames) CHECK(frame.payload == std::string(100, char(got++)));
        CHECK(got == 100 || a->statistics().backlog_bytes > 0);
        CHECK(drain(*a).empty());  // the bit says there is space: no polling, no send needed
    }
    CHECK(a->statistics().backlog_bytes == 0);
    a->close(0), b->close(0), c->close(0);
    check_empty(*s);
}

TEST(large_payloads_go_through_the_arena) {
    auto s = make_segment(1024, 1 << 20);
    auto a = Lane::open(s, -1), b = Lane::open(s, -1);
    std::string large(300000, 'l');
    CHECK(send(*a, b->address(), large) == 0);
    CHECK(send(*a, b->address(), "small") == 0);
    CHECK(s->statistics().slots_used == 1 && a->store().list().empty() && a->store().statistics().frames == 1);
    auto frames = drain(*b);
    CHECK(frames.size() == 2 && frames[0].payload == large && frames[1].payload == "small");
    CHECK(s->statistics().slots_used == 0);
    CHECK_THROWS(ArenaFull, send(*a, b->address(), std::string(32 << 20, 'x')));

    // Without room in the arena a large frame waits at the sender, and what follows waits behind it.
    static const char id[kObjectIdBytes] = {};
    u64 filler = a->store().create(id, s->header().heap_bytes - (1 << 16), a->address(), kKindFrame);
    CHECK(send(*a, b->address(), large) == i64(large.size()));
    CHECK(send(*a, b->address(), "after") > 0);
    CHECK(a->flush() > 0 && drain(*b).empty());
    a->store().abort(filler);
    CHECK(a->flush() == 0);
    frames = drain(*b);
    CHECK(frames.size() == 2 && frames[0].payload == large && frames[1].payload == "after");
    CHECK(s->statistics().slots_used == 0);
    CHECK(send(*a, b->address(), "still works") == 0 && drain(*b).size() == 1);
    // In a backlog, and dropped with it.
    for (int i = 0; i < 100; i++) send(*a, b->address(), large.substr(0, 2000));
    CHECK(a->statistics().backlog_bytes > 0);
    s->mark_dead(b->address());
    reclaim(*s, b->address());
    drain(*a);
    CHECK(a->statistics().backlog_bytes == 0 && s->statistics().slots_used == 0 && s->statistics().rings_used == 0);
    a->close(0);
    check_empty(*s);
}

TEST(well_known_lanes_wait_for_their_owner) {
    auto s = make_segment();
    auto a = Lane::open(s, -1);
    u64 role = make_address(7, 2, 0);
    CHECK(send(*a, role, "before") == 0);
    CHECK(send(*a, role, std::string(100000, 'b')) == 0);
    CHECK_THROWS(std::invalid_argument, send(*a, make_address(7, 20, 0), "x"));
    CHECK_THROWS(std::invalid_argument, send(*a, make_address(7, 5000, 1), "x"));
    CHECK(send(*a, make_address(7, 2, 1), "x") == -1);
    auto role_lane = Lane::open(s, 2);
    auto frames = drain(*role_lane);
    CHECK(frames.size() == 2 && frames[0].payload == "before" && frames[1].payload.size() == 100000);
    CHECK(send(*a, role_lane->address(), "exact") == 0);
    s->mark_dead(role_lane->address());
    CHECK(send(*a, role, "x") == -1);
    reclaim(*s, role_lane->address());
    CHECK(send(*a, role, "for the next") == 0);
    // Its sender dies before it opens: the frame still waits.
    a->close(0);
    auto next = Lane::open(s, 2);
    frames = drain(*next);
    CHECK(frames.size() == 1 && frames[0].payload == "for the next");
    next->close(0);
    check_empty(*s);
}

TEST(the_dead_get_nothing) {
    auto s = make_segment();
    auto a = Lane::open(s, -1), b = Lane::open(s, -1);
    u64 dead = b->address();
    CHECK(send(*a, dead, "unread") == 0);
    b->close(0);
    CHECK(send(*a, dead, "x") == -1);
    CHECK(s->statistics().rings_used == 0);  // given back by the failed send
    auto c = Lane::open(s, -1);
    CHECK(address_index(c->address()) == address_index(dead));
    CHECK(send(*a, dead, "x") == -1 && drain(*c).empty());
    CHECK(send(*a, c->address(), "y") == 0 && drain(*c).size() == 1);
    CHECK_THROWS(std::runtime_error, send(*b, a->address(), "x"));
    CHECK(drain(*b).empty());
    a->close(0), c->close(0);
    check_empty(*s);
}

TEST(what_the_dead_had_sent_arrives) {  // RECLAIM-3, RING-2
    auto s = make_segment();
    auto a = Lane::open(s, -1), b = Lane::open(s, -1);
    u64 dead = a->address();
    std::string large(100000, 'd');
    send(*a, b->address(), "1"), send(*a, b->address(), large), send(*a, b->address(), "3");
    s->mark_dead(dead);
    reclaim(*s, dead);
    auto successor = Lane::open(s, int(address_index(dead)));
    send(*successor, b->address(), "4");
    Inbox inbox;
    CHECK(b->drain_from(dead, inbox) == 3);
    CHECK(inbox.frames[1].payload == large);
    auto frames = drain(*b);
    CHECK(frames.size() == 1 && frames[0].src == successor->address() && frames[0].payload == "4");
    // And an heir that dies as well frees it.
    send(*successor, b->address(), large);
    s->mark_dead(successor->address());
    reclaim(*s, successor->address());
    CHECK(s->statistics().slots_used == 1);
    b->close(0);
    check_empty(*s);
}

TEST(frames_for_a_predecessor_are_dropped) {  // RING-2
    auto s = make_segment();
    auto a = Lane::open(s, -1), b = Lane::open(s, 3);
    u64 old = b->address();
    send(*a, make_address(7, 3, 0), "old");
    s->mark_dead(old);
    reclaim(*s, old);
    auto c = Lane::open(s, 3);
    CHECK(drain(*c).empty());
    send(*a, make_address(7, 3, 0), "new");
    CHECK(drain(*c).size() == 1);
    a->close(0), c->close(0);
    check_empty(*s);
}

TEST(other_nodes_are_reached_through_the_link) {
    auto s = make_segment();
    auto a = Lane::open(s, -1), link = Lane::open(s, 1), b = Lane::open(s, -1);
    u64 far = make_address(8, 30, 4);
    CHECK(send(*a, far, "out") == 0);
    auto frames = drain(*link);
    CHECK(frames.size() == 1 && frames[0].src == a->address() && frames[0].dest == far);
    CHECK(link->forward(far, b->address(), "in", 2) == 0);
    frames = drain(*b);
    CHECK(frames.size() == 1 && frames[0].src == far && frames[0].dest == b->address() && frames[0].payload == "in");
    CHECK_THROWS(std::invalid_argument, link->forward(far, far, "", 0));
    s->mark_dead(link->address());
    CHECK(send(*a, far, "out") == -1);
    reclaim(*s, link->address());
    a->close(0), b->close(0);
    check_empty(*s);
}

TEST(sources_take_turns) {
    auto s = make_segment();
    auto to = Lane::open(s, -1);
    std::vector<std::shared_ptr<Lane>> from;
    for (int i = 0; i < 70; i++) {
        from.push_back(Lane::open(s, -1));
        for (int k = 0; k < 20; k++) send(*from.back(), to->address(), "x");
    }
    std::vector<int> seen(1024, 0);
    int total = 0;
    for (int call = 0; call < 140; call++)
        for (Received& frame : drain(*to, 10)) seen[address_index(frame.src)]++, total++;
    CHECK(total == 1400);
    for (auto& lane : from) CHECK(seen[address_index(lane->address())] == 20);
    for (auto& lane : from) send(*lane, to->address(), std::string(10, 'y'));
    for (auto& lane : from) send(*lane, to->address(), std::string(10, 'y'));
    std::vector<int> again(1024, 0);
    for (int call = 0; call < 70; call++)
        for (Received& frame : drain(*to, 1)) again[address_index(frame.src)]++;
    for (auto& lane : from) CHECK(again[address_index(lane->address())] == 1);  // one each before anyone's second
    for (auto& lane : from) lane->close(0);
    to->close(0);
    check_empty(*s);
}

TEST(no_ring_left_means_backlog) {  // LANE-1
    auto s = make_segment(1024, 1 << 20, 7, 64);
    auto a = Lane::open(s, -1), b = Lane::open(s, -1);
    s->header().rings_high.store(s->header().max_rings);
    CHECK(send(*a, b->address(), "waits") == 5);
    CHECK(receive(*a, 0.03).empty() && a->statistics().backlog_bytes == 5);
    s->header().rings_high.store(0);
    CHECK(receive(*a, 0.03).empty() && a->statistics().backlog_bytes == 0);  // found one by itself
    CHECK(drain(*b).size() == 1);
    a->close(0), b->close(0);
    check_empty(*s);
}

static void ping_pong(bool spin, int rounds) {
    auto s = make_segment();
    auto a = Lane::open(s, -1), b = Lane::open(s, -1);
    std::thread echo([&] {
        for (int got = 0; got < rounds;)
            for (Received& frame : receive(*b, 20, spin)) {
                send(*b, frame.src, frame.payload);
                got++;
            }
    });
    for (int i = 0; i < rounds; i++) {
        send(*a, b->address(), std::to_string(i));
        auto frames = receive(*a, 20, spin);
        CHECK(frames.size() == 1 && frames[0].payload == std::to_string(i));
    }
    echo.join();
    a->close(0), b->close(0);
    check_empty(*s);
}
TEST(ping_pong_spinning) { ping_pong(true, 10000 * kLoad); }
TEST(ping_pong_parking) { ping_pong(false, 4000 * kLoad); }  // LANE-4

TEST(nobody_sleeps_through_a_frame) {  // LANE-3, LANE-4, and want_space
    auto s = make_segment(1024);
    constexpr int kSenders = 3;
    const int each = 8000 * kLoad;
    auto to = Lane::open(s, -1);
    std::vector<std::thread> threads;
    for (int i = 0; i < kSenders; i++)
        threads.emplace_back([&, i] {
            auto lane = Lane::open(s, -1);
            std::mt19937_64 random{u64(i)};
            for (u64 k = 0; k < u64(each); k++) {
                std::string payload(8 + random() % 200, char(k));
                memcpy(&payload[0], &k, 8);
                CHECK(send(*lane, to->address(), payload) >= 0);
                if (random() % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random() % 100));
            }
            // Only "there is space" can end these waits.
            CHECK(lane->enter_foreground(kNever));
            while (lane->statistics().backlog_bytes != 0) {
                CHECK(lane->wait_foreground(monotonic_ns() + 20'000'000'000, false) == Wait::kReady);
                Inbox inbox;
                lane->drain(inbox, 100, true);
            }
            lane->leave_foreground();
            lane->close(20);
        });
    std::vector<u64> next(1024, 0);
    std::mt19937_64 random(9);
    for (int got = 0; got < kSenders * each;) {
        auto frames = receive(*to, 20, random() % 2);
        CHECK(!frames.empty());
        for (Received& frame : frames) {
            u64 number;
            memcpy(&number, frame.payload.data(), 8);
            CHECK(number == next[address_index(frame.src)]++);
            got++;
        }
    }
    for (std::thread& thread : threads) thread.join();
    to->close(0);
    check_empty(*s);
}

// The background's thread of a lane, until that is closed; counts what it takes.
static std::thread background(Lane& lane, std::atomic<int>& got) {
    return std::thread([&lane, &got] {
        Inbox inbox;
        for (;;) {
            Wait outcome = lane.wait_background(kNever);
            if (outcome == Wait::kClosed) return;
            if (outcome == Wait::kReady) got += int(lane.drain(inbox, 1000, false));
        }
    });
}

// A foreground that drains often, and then not for long, because it computes or sleeps.
TEST(background_looks_rarely_and_takes_over_in_time) {  // LANE-6
    auto s = make_segment();
    auto a = Lane::open(s, -1), b = Lane::open(s, -1);
    std::atomic<int> got{0};
    std::thread io = background(*b, got);
    for (bool computes : {true, false}) {
        const u64 before = b->statistics().background_ticks;
        const i64 start = monotonic_ns();
        i64 passed = 0;
        while ((passed = monotonic_ns() - start) < 400'000'000) {
            send(*a, b->address(), "x");
            receive(*b, 0, true, 10);
        }
        const i64 ticks = i64(b->statistics().background_ticks - before);
        CHECK(ticks * 4 < passed / 1'000'000);
        got = 0;
        send(*a, b->address(), "x");
        const i64 left = monotonic_ns();
        while (got == 0) {
            CHECK(monotonic_ns() - left < 10'000'000'000);
            if (!computes) std::this_thread::sleep_for(std::chrono::milliseconds(50));
        }
    }
    b->close(0);
    io.join();
    a->close(0);
    check_empty(*s);
}

TEST(background_drains_what_nobody_takes) {  // LANE-6
    auto s = make_segment();
    auto a = Lane::open(s, -1), b = Lane::open(s, -1);
    std::atomic<int> got{0};
    std::thread io = background(*b, got);
    auto wait_for = [&](int count) {
        i64 start = monotonic_ns();
        while (got < count) {
            CHECK(monotonic_ns() - start < 10'000'000'000);
            std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
    };
    int sent = 0;
    for (int eager = 0; eager < 2; eager++) {
        b->eager = eager;
        for (int i = 0; i < 20; i++) {
            for (int k = 0; k < 10; k++) send(*a, b->address(), "x"), sent++;
            wait_for(sent);
            // Long enough to park now and then.
            std::this_thread::sleep_for(std::chrono::milliseconds(i % 7 == 0 ? 70 : i % 3));
        }
    }
    // A foreground thread that leaves frames behind hands them over, parked or not.
    b->eager = 0;
    std::this_thread::sleep_for(std::chrono::milliseconds(80));
    for (int k = 0; k < 50; k++) send(*a, b->address(), "x"), sent++;
    got += int(receive(*b, 5, true, 10).size());
    wait_for(sent);
    b->close(0);
    io.join();
    a->close(0);
    check_empty(*s);
}

TEST(foreground_and_background_at_once) {  // LANE-2
    auto s = make_segment(4096);
    auto a = Lane::open(s, -1), b = Lane::open(s, -1);
    const int total = 40000 * kLoad;
    std::atomic<int> got{0};
    std::atomic<bool> stop{false};
    std::thread io([&] {
        Inbox inbox;
        for (;;) {
            Wait outcome = b->wait_background(kNever);
            if (outcome == Wait::kClosed) return;
            if (outcome == Wait::kReady) got += int(b->drain(inbox, 1000, false));
            inbox.frames.clear();
        }
    });
    std::thread user([&] {
        std::mt19937_64 random(4);
        while (!stop) {
            got += int(receive(*b, 0.01, random() % 2, 1 + random() % 50).size());
            if (random() % 50 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(random() % 4));
            if (random() % 100 == 0) b->eager = int(random() % 2);
        }
    });
    std::thread sender_io([&] {
        while (a->wait_background(kNever) != Wait::kClosed) {
            Inbox inbox;
            a->drain(inbox, 100, false);
        }
    });
    for (int i = 0; i < total; i++) send(*a, b->address(), "0123456789012345678901234567890123456789");
    i64 start = monotonic_ns();
    while (got < total) {
        CHECK(monotonic_ns() - start < 60'000'000'000);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(got == total && a->statistics().backlog_bytes == 0);
    stop = true;
    user.join();
    b->close(0);
    a->close(0);
    io.join(), sender_io.join();
    check_empty(*s);
}

TEST(waits_end) {
    auto s = make_segment();
    auto a = Lane::open(s, -1);
    CHECK(a->wait_foreground(monotonic_ns() + 10'000'000, true) == Wait::kTimeout);
    CHECK(a->wait_background(monotonic_ns() + 10'000'000) == Wait::kTimeout);
    a->wake();  // sticky
    CHECK(a->wait_foreground(kNever, true) == Wait::kWoken);
    a->wake_background();
    CHECK(a->wait_background(kNever) == Wait::kWoken);
    for (int i = 0; i < 200; i++) {
        std::thread waker([&] {
            if (i % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(i * 3));
            a->wake();
            a->wake_background();
        });
        CHECK(a->wait_foreground(kNever, i % 2) == Wait::kWoken);
        CHECK(a->wait_background(kNever) == Wait::kWoken);
        waker.join();
    }
    std::thread waits([&] {
        Wait outcome;
        do outcome = a->wait_background(kNever);
        while (outcome != Wait::kClosed);
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    a->close(0);
    waits.join();
    CHECK(a->close(0).empty());
    check_empty(*s);
}

TEST(a_fork_must_open_its_own_lane) {
    if (kThreadSanitizer) return;
    auto s = make_segment();
    auto a = Lane::open(s, -1);
    u64 address = a->address();
    int status = in_child([&] {
        CHECK_THROWS(std::runtime_error, send(*a, address, "x"));
        CHECK_THROWS(std::runtime_error, drain(*a));
        CHECK_THROWS(std::runtime_error, a->close(0));
        CHECK(!a->usable());
        auto own = Lane::open(s, -1);
        send(*own, address, "from the child");
        own->close(1);
    });
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(receive(*a, 5)[0].payload == "from the child");
    a->close(0);
    check_empty(*s);
}

TEST(processes_ping_pong) {
    if (kThreadSanitizer) return;
    for (bool spin : {true, false}) {
        auto s = make_segment();
        auto a = Lane::open(s, -1);
        const int rounds = 5000;
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            auto own = Lane::open(s, 2);
            for (int got = 0; got < rounds;)
                for (Received& frame : receive(*own, 20, spin)) send(*own, frame.src, frame.payload), got++;
            own->close(1);
            _exit(0);
        }
        i64 start = 0;
        for (int i = 0; i < rounds; i++) {
            if (i == 1) start = monotonic_ns();
            std::string payload(i % 100 == 0 ? 70000 : 200, char(i));
            send(*a, make_address(7, 2, 0), payload);
            auto frames = receive(*a, 20, spin);
            CHECK(frames.size() == 1 && frames[0].payload == payload);
        }
        printf("%s %.2f us, ", spin ? "spinning" : "parked", double(monotonic_ns() - start) / rounds / 1e3);
        int status;
        CHECK(waitpid(pid, &status, 0) == pid && status == 0);
        a->close(0);
        check_empty(*s);
    }
}

RUN_TESTS()
