// segment: creating, attaching, lanes' lives, and the repair of a killed holder's mutex.
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>

#include "../heap.h"
#include "../ring.h"
#include "check.h"

using namespace hpc;

TEST(attach_sees_the_same_memory) {
    auto a = make_segment();
    auto b = Segment::attach(a->fd());
    CHECK(a->base() != b->base());
    CHECK(b->node() == 7);
    auto lane = Lane::open(a, 3);
    CHECK(b->alive(lane->address()));
    CHECK(b->lanes().size() == 1 && b->lanes()[0].pid == u32(getpid()));
    lane->close(0);
    check_empty(*b);
}

TEST(attach_refuses_what_is_no_segment) {  // SEGMENT-1
    CHECK_THROWS(std::runtime_error, Segment::attach(-1));
    int empty = memfd_create("empty", 0);
    CHECK_THROWS(std::invalid_argument, Segment::attach(empty));
    CHECK(ftruncate(empty, 1 << 20) == 0);
    CHECK_THROWS(std::invalid_argument, Segment::attach(empty));
    close(empty);
    auto a = make_segment();
    a->header().version = kLayoutVersion + 1;
    try {
        Segment::attach(a->fd());
        CHECK(!"reached");
    } catch (const std::invalid_argument& e) {
        CHECK(strstr(e.what(), "layout version"));
    }
    a->header().version = kLayoutVersion;
    a->header().max_slots /= 2;
    CHECK_THROWS(std::invalid_argument, Segment::attach(a->fd()));
}

TEST(a_segment_cannot_be_shrunk) {  // SEGMENT-2
    auto a = make_segment();
    CHECK(ftruncate(a->fd(), 4096) != 0);
}

TEST(sizes_that_cannot_be) {
    CHECK_THROWS(std::invalid_argument, make_segment(1000));
    CHECK_THROWS(std::invalid_argument, make_segment(65536, 1 << 20, 70000));
    CHECK_THROWS(std::invalid_argument, make_segment(65536, 1 << 20, 0, 100));
}

TEST(only_touched_pages_count) {
    auto a = make_segment(65536, u64(1) << 34);
    CHECK(a->statistics().resident_bytes < (8u << 20));
}

TEST(lanes_are_claimed_once_and_come_back_with_a_higher_incarnation) {
    auto s = make_segment();
    auto first = Lane::open(s, -1);
    auto second = Lane::open(s, -1);
    auto named = Lane::open(s, 5);
    CHECK(address_index(first->address()) == 16 && address_index(second->address()) == 17);
    CHECK(address_incarnation(first->address()) == 1);
    CHECK_THROWS(std::runtime_error, Lane::open(s, 5));
    CHECK_THROWS(std::invalid_argument, Lane::open(s, 1024));
    CHECK_THROWS(std::invalid_argument, reclaim(*s, first->address()));
    CHECK(s->mark_dead(first->address()));
    CHECK(!s->mark_dead(first->address()));
    CHECK_THROWS(std::runtime_error, Lane::open(s, 16));  // dead, not reclaimed
    CHECK(reclaim(*s, first->address()).empty());
    CHECK(reclaim(*s, first->address()).empty());  // RECLAIM-2
    auto again = Lane::open(s, -1);
    CHECK(address_index(again->address()) == 16 && address_incarnation(again->address()) == 2);
    CHECK(!s->alive(first->address()) && s->alive(again->address()));
    CHECK(!s->mark_dead(first->address()));
    CHECK(s->alive(again->address()));
    again->close(0), second->close(0), named->close(0);
    check_empty(*s);
}

TEST(all_lanes_taken) {
    auto s = make_segment(1024, 1 << 20, 0, 64);
    std::vector<std::shared_ptr<Lane>> lanes;
    for (int i = 16; i < 64; i++) lanes.push_back(Lane::open(s, -1));
    CHECK_THROWS(std::runtime_error, Lane::open(s, -1));
    for (auto& lane : lanes) lane->close(0);
    check_empty(*s);
}

TEST(a_killed_holder_of_the_mutex_is_repaired) {  // SEGMENT-3, HEAP-2, RING-4
    if (kThreadSanitizer) return;
    auto s = make_segment();
    auto keep = Lane::open(s, -1);
    static const char id[kObjectIdBytes] = {1};
    u64 kept = keep->store().create(id, 1000, 0);
    int status = in_child([&] {
        new Segment::Lock(*s);
        heap_allocate(*s, 5000, make_handle(9, 9));  // a block without an object
        u32 ring = ring_acquire(*s, 40, 41);
        s->directory(40, 41).store(0);  // a ring without a directory entry
        (void)ring;
        s->header().bins[5] = 77;  // derived words can be anything
        s->header().free_slot = 12345;
        s->header().heap_used.store(1);
        kill(getpid(), SIGKILL);
    });
    CHECK(WIFSIGNALED(status));
    check_valid(*s);
    CHECK(s->statistics().repairs == 1);
    CHECK(s->statistics().slots_used == 1);
    keep->store().abort(kept);
    keep->close(0);
    check_empty(*s);
}

RUN_TESTS()
