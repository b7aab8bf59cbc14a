// store: the node's objects, as one process sees them.
//
// An object is a slot (its life) and a heap block (its bytes). Its handle is slot | generation << 32; a handle never
// means another object later. Life: FREE -> CREATING -> SEALED -> DOOMED -> FREE, each step one store of the slot's
// word (LAYOUT-1). An object whose bytes are in a file has no block: SEALED -> SPILLED, or CREATING -> SPILLED when it
// was made there; SPILLED -> FREE. The files are their callers' affair.
//
// STORE-1 (pins): a pin is one bit for each process, set before the state is looked at again; delete sets DOOMED
//   before it looks at the bits. Both are seq_cst, so the pinner sees DOOMED or the deleter sees the bit (Dekker).
//   Counts of pins within a process are private; a killed process leaves one bit, which reclaim clears.
// STORE-2 (who frees): whoever finds a DOOMED object without pins frees it, under the mutex, after looking again.
// STORE-3 (readers): bytes are written while CREATING, by the creator or by the link that fetches them for it, and are
//   constant from SEALED on. Who asked the link to write does not abort before the link has answered or is dead.
// STORE-4 (dead owners): an object whose owner on this node is dead is doomed: by reclaim of the owner, or by seal,
//   which looks at the owner after it stored SEALED (reclaim looks at the objects after the lane is DEAD).
// STORE-5 (spilling): spill stores SPILLED, then looks at the pins, and takes it back if there are any (STORE-1's Dekker
//   again), all under the mutex. So a block goes only when nobody reads it, and SPILLED changes under the mutex only.
// STORE-6 (frames have room): objects never fill the last part of the heap, so that large messages get through while
//   the arena is full.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "segment.h"

namespace hpc {

struct ArenaFull : std::runtime_error {
    ArenaFull(u64 asked, u64 largest_free, u64 free, u64 capacity);
    u64 asked_bytes, largest_free_bytes, free_bytes, capacity_bytes;
};

struct ObjectRecord {
    u64 handle = 0, size = 0, owner = 0, creator = 0;
    bool sealed = false, claimed = false;  // sealed: complete, wherever its bytes are
    bool on_disk = false;
    char id[kObjectIdBytes] = {};
};

struct StoreStatistics {
    u64 capacity_bytes, used_bytes, largest_free_bytes;
    u32 objects, creating, doomed, pinned, frames, spilled;
};

struct Victim {
    u64 handle, size;
};

enum Removed : u32 { kGone = 0, kFromArena = 1, kFromDisk = 2 };  // on disk: the caller removes the file

bool slot_pinned(const Slot& slot);
// SEALED -> DOOMED and, without pins, freed; SPILLED -> FREE. The caller holds Segment::Lock. Wrong or old handles:
// nothing.
Removed store_delete_locked(Segment& segment, u64 handle);
// Frees the slot if it is DOOMED and unpinned (or, with force, CREATING or SPILLED). The caller holds Segment::Lock.
bool store_free_locked(Segment& segment, u32 slot, bool force);

class Store {
  public:
    Store(std::shared_ptr<Segment> segment, u64 address);

    // All of these: any thread of the process that opened the lane, with or without the GIL; none blocks but for the
    // segment's mutex (well below a microsecond, unless it must repair). Memory stays the segment's.

    // A new object of `size` bytes in state CREATING. Throws ArenaFull. `id` is 28 bytes.
    u64 create(const char* id, u64 size, u64 owner, u32 kind = kKindObject);
    // The same without a block: the bytes go to a file. Throws ArenaFull when no slot is left.
    u64 create_on_disk(const char* id, u64 size, u64 owner);
    // Where to write; only the creator and the link, only while CREATING (throws invalid_argument otherwise).
    char* write_address(u64 handle, u64& size);
    // Copies into an object that is being created, with up to four threads for large copies; prepares the memory first.
    void write(u64 handle, u64 offset, const void* source, u64 bytes);
    // So many bytes at write_address are about to be written: maps their pages, if the object still is being created.
    void prepare(u64 handle, u64 offset, u64 bytes);
    void seal(u64 handle);
    void abort(u64 handle);
    // Pins and gives the data's address; nullptr when the object is gone or not sealed. Each pin needs one unpin.
    const char* pin(u64 handle, u64& size);
    void unpin(u64 handle);
    // SEALED -> DOOMED or SPILLED -> FREE. Readers keep their pins.
    Removed remove(u64 handle);
    // The bytes are in a file by now: SEALED -> SPILLED, and the block is free; false when it is pinned or gone.
    bool spill(u64 handle);
    // Sealed objects in the arena that nobody pins, least recently used first. A snapshot.
    std::vector<Victim> victims();
    // Bytes that objects may still fill, and of the largest one that could be created now.
    void room(u64& free, u64& largest);
    bool claim(u64 handle);
    // The lane is about to go: from now on pin gives nullptr and unpin does nothing.
    void detach();
    std::optional<ObjectRecord> info(u64 handle);
    std::vector<ObjectRecord> list();
    StoreStatistics statistics();
    u64 trim();

    Segment& segment() const { return *segment_; }
    u64 address() const { return address_; }

  private:
    u64 create_slot(const char* id, u64 size, u64 owner, u32 kind, bool in_arena);
    Slot* find(u64 handle);
    void free_if_doomed(u32 slot);
    void populate(char* first, char* last);
    void make_huge(char* first, char* last, char* end);
    bool is_populated(const char* first, const char* last) const;
    void set_populated(const char* first, const char* last);
    u64 part_of(const char* address) const { return u64(address - segment_->base()) / kPopulated; }

    std::shared_ptr<Segment> segment_;
    u64 address_;
    u32 lane_;
    std::mutex pins_mutex_;
    bool detached_ = false;  // guarded by pins_mutex_
    // Pins of this process, by slot; calloc'd, so untouched pages cost nothing.
    std::unique_ptr<u32, void (*)(void*)> pins_;
    // Parts of the segment, kPopulated bytes each, whose pages this process has mapped before (calloc'd as well). Walking the
    // tables once more costs a fifth of the copy. A hint: pages that trim has taken come back one by one.
    static constexpr u64 kPopulated = 65536;
    std::unique_ptr<atomic<bool>, void (*)(void*)> populated_;
    static constexpr u64 kHugeBatch = 8u << 20;  // made huge at once, up to a multiple of it
    atomic<u32> huge_failures_{0};               // in a row
};

}  // namespace hpc
