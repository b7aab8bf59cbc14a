// store and heap: objects' lives, pins, the allocator under random load, threads.
#include <string.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <random>
#include <thread>

#include "../heap.h"
#include "check.h"

using namespace hpc;

static const char kId[kObjectIdBytes + 1] = "twenty-eight bytes of an id.";

TEST(an_objects_life) {
    auto s = make_segment();
    auto lane = Lane::open(s, -1);
    auto other = Lane::open(s, -1);
    Store& store = lane->store();
    u64 handle = store.create(kId, 100, lane->address());
    u64 size;
    CHECK(store.pin(handle, size) == nullptr);  // not sealed
    CHECK_THROWS(std::invalid_argument, other->store().write_address(handle, size));
    char* data = store.write_address(handle, size);
    CHECK(size == 100 && reinterpret_cast<u64>(data) % 64 == 0);
    memset(data, 'x', 100);
    CHECK(!store.remove(handle));
    store.seal(handle);
    CHECK_THROWS(std::invalid_argument, store.seal(handle));
    CHECK_THROWS(std::invalid_argument, store.write_address(handle, size));
    CHECK_THROWS(std::invalid_argument, store.abort(handle));
    auto info = other->store().info(handle);
    CHECK(info && info->sealed && info->size == 100 && memcmp(info->id, kId, kObjectIdBytes) == 0);
    const char* seen = other->store().pin(handle, size);
    CHECK(seen && size == 100 && seen[99] == 'x');
    CHECK(store.remove(handle));
    CHECK(!store.remove(handle));
    CHECK(other->store().pin(handle, size) == nullptr);  // doomed
    CHECK(!store.info(handle));
    CHECK(s->statistics().slots_used == 1);  // STORE-2: the pin keeps it
    CHECK(seen[50] == 'x');
    other->store().unpin(handle);
    CHECK(s->statistics().slots_used == 0);
    // A handle never means another object.
    u64 next = store.create(kId, 100, 0);
    CHECK(handle_slot(next) == handle_slot(handle) && next != handle);
    store.seal(next);
    CHECK(store.pin(handle, size) == nullptr && !store.remove(handle) && !store.claim(handle) && !store.info(handle));
    CHECK(store.claim(next) && store.remove(next));
    lane->close(0), other->close(0);
    check_empty(*s);
}

TEST(handles_of_nothing) {
    auto s = make_segment();
    auto lane = Lane::open(s, -1);
    u64 size;
    for (u64 handle : {u64(0), u64(5), ~u64(0), make_handle(3, 1)}) {
        CHECK(!lane->store().pin(handle, size) && !lane->store().remove(handle) && !lane->store().claim(handle));
        CHECK_THROWS(std::invalid_argument, lane->store().seal(handle));
        CHECK_THROWS(std::invalid_argument, lane->store().abort(handle));
        CHECK_THROWS(std::invalid_argument, lane->store().write(handle, 0, "", 0));
    }
    lane->close(0);
}

TEST(arena_full_says_what_there_is) {
    auto s = make_segment(65536, 1 << 20);
    auto lane = Lane::open(s, -1);
    Store& store = lane->store();
    std::vector<u64> handles;
    try {
        for (;;) handles.push_back(store.create(kId, 100000, 0));
    } catch (const ArenaFull& e) {
        CHECK(e.asked_bytes == 100000 && e.largest_free_bytes < 100000 && e.capacity_bytes == 1 << 20);
        CHECK(e.free_bytes < 110000);
    }
    CHECK(handles.size() == 10);
    for (u64 size : {~u64(0), ~u64(0) - 64, u64(1) << 63, u64(1) << 40}) CHECK_THROWS(ArenaFull, store.create(kId, size, 0));
    for (u64 handle : handles) store.abort(handle);
    // All of it in one piece again.
    u64 all = store.create(kId, (1 << 20) - 192, 0);
    CHECK_THROWS(ArenaFull, store.create(kId, 100, 0));
    store.abort(store.create(kId, 1 << 20, 0, kKindFrame));  // STORE-6
    store.abort(all);
    lane->close(0);
    check_empty(*s);
}

TEST(spilled_objects_keep_their_handles) {
    auto s = make_segment(65536, 1 << 20);
    auto lane = Lane::open(s, -1), other = Lane::open(s, -1);
    Store& store = lane->store();
    u64 size, free, largest, before = s->header().heap_used.load();
    u64 old = store.create(kId, 100000, lane->address());
    CHECK(store.victims().empty() && !store.spill(old));  // not sealed
    store.seal(old);
    u64 young = store.create(kId, 200000, lane->address());
    store.seal(young);
    auto victims = store.victims();
    CHECK(victims.size() == 2 && victims[0].handle == old && victims[0].size == 100000 && victims[1].handle == young);
    CHECK(other->store().pin(old, size));  // used by now, and in use
    CHECK(store.victims().size() == 1 && !store.spill(old) && store.info(old)->sealed && !store.info(old)->on_disk);
    other->store().unpin(old);
    CHECK(store.victims()[0].handle == young);
    CHECK(store.spill(old) && !store.spill(old) && store.info(old)->sealed && store.info(old)->on_disk);
    CHECK(other->store().pin(old, size) == nullptr && store.claim(old) && store.list().size() == 2);
    CHECK(store.remove(young) == Removed::kFromArena && s->header().heap_used.load() == before);
    store.room(free, largest);
    CHECK(free == 1 << 20 && largest == free - 64 && store.statistics().spilled == 1);
    CHECK(other->store().remove(old) == Removed::kFromDisk && store.remove(old) == Removed::kGone && !store.info(old));
    // Made outside of the arena from the start; aborted, and lost with its creator.
    u64 outside = store.create_on_disk(kId, 1 << 30, other->address());
    CHECK_THROWS(std::invalid_argument, store.write_address(outside, size));
    CHECK(!store.info(outside)->sealed && store.info(outside)->on_disk);
    store.seal(outside);
    CHECK(store.info(outside)->sealed && s->header().heap_used.load() == before);
    store.abort(store.create_on_disk(kId, 5, 0));
    other->close(0);  // the owner
    CHECK(!store.info(outside));
    lane->close(0);
    check_empty(*s);
}

TEST(a_spill_that_was_killed_is_finished_by_repair) {
    for (bool pinned : {false, true}) {
        auto s = make_segment(65536, 1 << 20);
        auto lane = Lane::open(s, -1);
        Store& store = lane->store();
        u64 handle = store.create(kId, 100000, lane->address());
        store.seal(handle);
        u64 size;
        if (pinned) CHECK(store.pin(handle, size));
        s->slot(handle_slot(handle)).word.store(slot_word(kSlotSpilled, handle_generation(handle)));
        {
            Segment::Lock lock(*s);
            heap_repair(*s);
        }
        std::vector<std::string> problems;
        heap_validate(*s, problems);
        CHECK(problems.empty() && store.info(handle)->on_disk == !pinned);
        if (pinned) store.unpin(handle);
        store.remove(handle);
        lane->close(0);
        check_empty(*s);
    }
}

TEST(spilling_while_others_read) {
    auto s = make_segment(65536, 4 << 20);
    auto lane = Lane::open(s, -1), other = Lane::open(s, -1);
    std::atomic<bool> over{false};
    std::atomic<u64> current{0};
    std::thread reader([&] {
        u64 size;
        while (!over.load()) {
            u64 handle = current.load();
            if (const char* data = other->store().pin(handle, size)) {
                CHECK(u64(data[0]) == handle % 100 && data[size - 1] == data[0]);  // else its block had gone
                other->store().unpin(handle);
            }
        }
    });
    u64 spilled = 0;
    for (int i = 0; i < 20000; i++) {
        u64 handle = lane->store().create(kId, 10000, lane->address()), size;
        char* data = lane->store().write_address(handle, size);
        memset(data, int(handle % 100), size);
        lane->store().seal(handle);
        current.store(handle);
        spilled += lane->store().spill(handle);
        CHECK(lane->store().remove(handle) != Removed::kGone);
    }
    over.store(true);
    reader.join();
    CHECK(spilled > 0);
    lane->close(0), other->close(0);
    check_empty(*s);
}

TEST(slots_run_out_like_memory) {
    auto s = make_segment(65536, 16 << 20);
    auto lane = Lane::open(s, -1);
    std::vector<u64> handles;
    try {
        for (;;) handles.push_back(lane->store().create(kId, 0, 0));
    } catch (const ArenaFull&) {
    }
    CHECK(handles.size() == s->header().max_slots);
    for (u64 handle : handles) lane->store().abort(handle);
    lane->close(0);
    check_empty(*s);
}

TEST(random_sizes_stay_whole) {  // HEAP-1, HEAP-3
    auto s = make_segment(65536, 8 << 20);
    auto lane = Lane::open(s, -1);
    Store& store = lane->store();
    std::mt19937_64 random(1);
    struct Content {
        u64 size;
        char fill;
    };
    std::map<u64, Content> live;
    for (int i = 0; i < 30000; i++) {
        if (live.empty() || random() % 100 < 52) {
            u64 size = random() % 10 == 0 ? random() % 300000 : random() % 2000;
            try {
                u64 handle = store.create(kId, size, 0);
                u64 got;
                char fill = char(random());
                memset(store.write_address(handle, got), fill, size);
                CHECK(got == size);
                live[handle] = {size, fill};
            } catch (const ArenaFull&) {
            }
        } else {
            auto it = live.begin();
            std::advance(it, random() % std::min<std::size_t>(live.size(), 50));
            u64 got;
            const char* data = store.write_address(it->first, got);
            for (u64 k = 0; k < got; k += 97) CHECK(data[k] == it->second.fill);
            store.abort(it->first);
            live.erase(it);
        }
        if (i % 1000 == 0) check_valid(*s);
        if (i % 5000 == 0) {  // a repair of a healthy heap changes nothing
            Segment::Lock lock(*s);
            u64 used = s->header().heap_used.load();
            heap_repair(*s);
            CHECK(used == s->header().heap_used.load());
        }
    }
    for (auto& [handle, content] : live) store.abort(handle);
    lane->close(0);
    check_empty(*s);
}

TEST(large_writes_and_trim) {
    auto s = make_segment(65536, u64(64) << 20);
    auto lane = Lane::open(s, -1);
    Store& store = lane->store();
    std::string content((40 << 20) + 12345, 0);
    for (std::size_t i = 0; i < content.size(); i++) content[i] = char(i * 31 + (i >> 12));
    u64 handle = store.create(kId, content.size() + 100, 0);
    store.write(handle, 77, content.data(), content.size());
    CHECK_THROWS(std::invalid_argument, store.write(handle, 200, content.data(), content.size()));
    CHECK_THROWS(std::invalid_argument, store.write(handle, ~u64(0), "x", 1));
    store.seal(handle);
    u64 size;
    CHECK(memcmp(store.pin(handle, size) + 77, content.data(), content.size()) == 0);
    store.unpin(handle);
    CHECK(store.trim() > 0);
    CHECK(s->statistics().resident_bytes > (40u << 20));
    store.remove(handle);
    CHECK(store.trim() > (40u << 20));
    CHECK(s->statistics().resident_bytes < (4u << 20));
    check_valid(*s);
    lane->close(0);
    check_empty(*s);
}

TEST(preparing_changes_no_byte) {
    auto s = make_segment(65536, 96 << 20);
    CHECK(reinterpret_cast<u64>(s->base()) % kHugePage == 0);
    std::mt19937_64 random(5);
    u64 size;
    for (int round = 0; round < 3; round++) {  // memory that is new, and that others have used
        auto lane = Lane::open(s, -1);
        auto link = Lane::open(s, int(kLinkLane));
        Store& store = lane->store();
        std::vector<std::pair<u64, char>> objects;
        for (u64 bytes : {u64(100), u64(65536), kHugePage - 64, kHugePage, 2 * kHugePage + 77, u64(9) << 20, u64(33 << 20) + 5}) {
            char mark = char('a' + random() % 26);
            u64 handle = store.create(kId, bytes, 0);
            char* data = link->store().write_address(handle, size);
            for (u64 at = 0; at < bytes;) {  // as a link receives it
                u64 part = std::min(bytes - at, 1 + random() % (5 << 20));
                link->store().prepare(handle, at, part);
                memset(data + at, mark, part);
                link->store().prepare(handle, at, part);
                at += part;
            }
            link->store().prepare(handle, bytes, 5);  // behind it: nothing
            store.seal(handle);
            link->store().prepare(handle, 0, bytes);  // complete: nothing
            objects.emplace_back(handle, mark);
        }
        for (auto [handle, mark] : objects) {
            const char* data = store.pin(handle, size);
            CHECK(data && std::all_of(data, data + size, [mark = mark](char byte) { return byte == mark; }));
            store.unpin(handle);
            store.remove(handle);
            store.prepare(handle, 0, size);  // gone: nothing
        }
        lane->close(0), link->close(0);
    }
    check_empty(*s);
}

TEST(pinners_and_deleters_at_once) {  // STORE-1
    auto s = make_segment(65536, 16 << 20);
    constexpr int kThreads = 4;
    std::vector<std::shared_ptr<Lane>> lanes;
    for (int i = 0; i < kThreads; i++) lanes.push_back(Lane::open(s, -1));
    std::atomic<u64> current{0};
    std::atomic<bool> stop{false};
    std::atomic<u64> pinned{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; i++)
        threads.emplace_back([&, i] {
            // Threads 1 and 2 share a process's view, 3 has its own.
            Store& store = lanes[std::size_t(i == 2 ? 1 : i)]->store();
            if (i == 0) {
                for (int round = 0; round < 20000; round++) {
                    u64 handle = store.create(kId, 256, 0), size;
                    memset(store.write_address(handle, size), char(handle >> 32), 256);
                    store.seal(handle);
                    current.store(handle);
                    if (round % 16 == 0) std::this_thread::yield();
                    CHECK(store.remove(handle));
                }
                stop = true;
                return;
            }
            while (!stop) {
                u64 handle = current.load(), size;
                const char* data = store.pin(handle, size);
                if (!data) continue;
                pinned++;
                for (int k = 0; k < 256; k += 15) CHECK(data[k] == char(handle >> 32));
                store.unpin(handle);
            }
        });
    for (std::thread& thread : threads) thread.join();
    CHECK(pinned > 0);
    for (auto& lane : lanes) lane->close(0);
    check_empty(*s);
}

TEST(reclaim_frees_what_a_dead_process_held) {
    auto s = make_segment();
    auto lane = Lane::open(s, -1), dead = Lane::open(s, -1), gone = Lane::open(s, -1);
    Store& store = lane->store();
    Store& theirs = dead->store();
    u64 size;
    u64 mine = store.create(kId, 10, lane->address());
    store.seal(mine);
    CHECK(theirs.pin(mine, size));
    CHECK(theirs.pin(mine, size));
    CHECK(store.remove(mine));  // stays, pinned by the dead
    theirs.create(kId, 1000, lane->address());  // creating
    u64 owned = store.create(kId, 10, dead->address());
    store.seal(owned);
    u64 unclaimed = theirs.create(kId, 10, lane->address());
    theirs.seal(unclaimed);
    u64 claimed = theirs.create(kId, 10, lane->address());
    theirs.seal(claimed);
    CHECK(store.claim(claimed));
    u64 remote = theirs.create(kId, 10, make_address(99, 20, 1));
    theirs.seal(remote);
    u64 ownerless = theirs.create(kId, 10, gone->address());
    theirs.seal(ownerless);
    gone->close(0);
    CHECK(!store.info(ownerless));
    u64 late = theirs.create(kId, 10, gone->address());
    theirs.seal(late);
    CHECK(!store.info(late));  // STORE-4
    CHECK(s->mark_dead(dead->address()));
    auto list = reclaim(*s, dead->address());
    CHECK(list.size() == 2);
    CHECK((list[0].handle == unclaimed && list[1].handle == remote) ||
          (list[1].handle == unclaimed && list[0].handle == remote));
    CHECK(memcmp(list[0].id, kId, kObjectIdBytes) == 0);
    CHECK(!store.info(owned) && store.info(claimed) && store.info(unclaimed));
    CHECK(s->statistics().slots_used == 3);
    store.remove(unclaimed), store.remove(claimed), store.remove(remote);
    lane->close(0);
    check_empty(*s);
}

RUN_TESTS()
