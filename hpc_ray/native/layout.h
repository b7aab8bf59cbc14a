// layout: what lies where in a node's segment; the only file that says so.
//
// Every process of the node maps the same memory at another address, so positions are offsets or indices and never
// pointers. All of it starts as zeros (memfd), and zero means free, empty, none: nothing is touched before it is used.
//
// LAYOUT-1 (one commit): a change that must survive kill -9 becomes visible by ONE atomic store or compare-and-swap;
//   whatever is written before it is unreachable until then. Every other word is derived and can be rebuilt.
// LAYOUT-2 (one lock): the robust mutex in Header guards what is rare (rings, lane openings, heap, slot free list);
//   a holder that dies leaves derived words wrong at worst, and the next taker rebuilds them (Segment::lock).
// LAYOUT-3 (no bare plain words): what one process writes while another may read it is std::atomic.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace hpc {

using u32 = std::uint32_t;
using u64 = std::uint64_t;
using i64 = std::int64_t;
template <class T>
using atomic = std::atomic<T>;

static_assert(atomic<u64>::is_always_lock_free && atomic<u32>::is_always_lock_free, "shared words must be lock-free");

constexpr u64 kMagic = 0x68706372'61790001ull;  // "hpcray" and a 1
constexpr u32 kLayoutVersion = 2;
constexpr u32 kMaxLanes = 1024;
constexpr u32 kLaneWords = kMaxLanes / 64;  // words of a bit set with one bit for each lane
constexpr u32 kWellKnownLanes = 16;         // indices below are for roles and are only claimed by name
constexpr u32 kLinkLane = 1;                // everything for another node goes to this lane of the own node
constexpr u32 kHeapBins = 512;
constexpr u64 round_up(u64 value, u64 unit) { return (value + unit - 1) / unit * unit; }
constexpr u64 kPage = 4096;
constexpr u64 kHugePage = 2u << 20;  // the heap begins at a multiple of it, in the file and in memory

// ---- addresses: node (16) | lane index (16) | incarnation (32) ---------------------------------------------------
constexpr u64 make_address(u32 node, u32 index, u32 incarnation) {
    return (u64(node) << 48) | (u64(index & 0xffff) << 32) | incarnation;
}
constexpr u32 address_node(u64 address) { return u32(address >> 48); }
constexpr u32 address_index(u64 address) { return u32(address >> 32) & 0xffff; }
constexpr u32 address_incarnation(u64 address) { return u32(address); }

// ---- lanes -------------------------------------------------------------------------------------------------------
enum LaneState : u32 { kLaneFree = 0, kLaneOpen = 1, kLaneDead = 2 };

enum WaiterBits : u32 {
    kForegroundActive = 1,   // a foreground thread is in receive and looks at the rings again before it parks
    kForegroundParked = 2,   // ... and it sleeps on fg_word
    kBackgroundParked = 4,   // the background thread sleeps on bg_word
};

struct LaneEntry {
    alignas(64) atomic<u64> word;  // state << 32 | incarnation: every change of a lane's life is one store of this word
    atomic<u32> pid;               // valid while OPEN or DEAD
    alignas(64) atomic<u32> waiter;
    atomic<u32> fg_word;
    atomic<u32> bg_word;
    atomic<i64> alone_since;       // ns; the foreground has left while the background rests: who sends much later wakes that. Or 0
    alignas(64) atomic<u64> ready[kLaneWords];  // bit s: look at the rings shared with lane s (in: frames, out: space)
};
static_assert(sizeof(LaneEntry) == 256, "layout");

constexpr u64 lane_word(u32 state, u32 incarnation) { return (u64(state) << 32) | incarnation; }
constexpr u32 lane_state(u64 word) { return u32(word >> 32); }
constexpr u32 lane_incarnation(u64 word) { return u32(word); }

// ---- rings -------------------------------------------------------------------------------------------------------
struct RingControl {
    alignas(64) atomic<u64> tail;  // bytes ever published; the producer's word
    atomic<u32> want_space;        // the producer has a backlog: tell it when there is room
    atomic<u32> closed;            // the producer is dead: free the ring once it is drained
    alignas(64) atomic<u64> head;  // bytes ever consumed; the consumer's word
    alignas(64) atomic<u32> used;  // guarded by the mutex, as are all below
    atomic<u32> dest;
    atomic<u32> src;
    u32 next_free;  // ring index + 1
};
static_assert(sizeof(RingControl) == 192, "layout");

enum FrameFlags : u32 {
    kFramePad = 1,     // skip to the ring's start; length counts the skipped bytes, nothing else is valid
    kFrameObject = 2,  // the payload is the u64 handle of an arena object that holds the real payload
};

struct Frame {
    u32 length;  // of header and payload, not rounded; frames start at multiples of 8
    u32 flags;
    u64 src;
    u64 dest;
};
static_assert(sizeof(Frame) == 24, "layout");

// ---- objects -----------------------------------------------------------------------------------------------------
// SPILLED: complete, but its bytes are in a file of the node's; no block.
enum SlotState : u32 { kSlotFree = 0, kSlotCreating = 1, kSlotSealed = 2, kSlotDoomed = 3, kSlotSpilled = 4 };
enum SlotKind : u32 { kKindObject = 0, kKindFrame = 1 };  // a frame's payload is nobody's object: never listed

constexpr std::size_t kObjectIdBytes = 28;

struct Slot {
    alignas(64) atomic<u64> word;  // generation << 32 | state: every change of an object's life is one store of this
    atomic<u64> offset;            // of the data in the segment; 0: they are (or will be) in a file
    atomic<u64> size;
    atomic<u64> owner;    // address; 0: nobody on this node
    atomic<u64> creator;  // address
    atomic<u32> claimed;
    atomic<u32> kind;
    u32 next_free;  // slot index + 1, guarded by the mutex
    u32 reserved;
    atomic<u64> id[4];  // 28 bytes and 4 zeros
    atomic<u64> used_at;  // monotonic nanoseconds: when it was last made, sealed or pinned
    alignas(64) atomic<u64> pins[kLaneWords];  // bit l: the process with lane l holds at least one pin
};
static_assert(sizeof(Slot) == 256, "layout");

constexpr u64 slot_word(u32 state, u32 generation) { return (u64(generation) << 32) | state; }
constexpr u32 slot_state(u64 word) { return u32(word); }
constexpr u32 slot_generation(u64 word) { return u32(word >> 32); }
constexpr u32 handle_slot(u64 handle) { return u32(handle); }
constexpr u32 handle_generation(u64 handle) { return u32(handle >> 32); }
constexpr u64 make_handle(u32 slot, u32 generation) { return (u64(generation) << 32) | slot; }

// ---- the heap ----------------------------------------------------------------------------------------------------
constexpr u64 kBlockMagic = 0x626c6f636b21ull;

struct Block {
    alignas(64) atomic<u64> size;  // header included, a multiple of 64; bit 0: used; 0: the end of the heap
    u64 handle;                    // of the object that uses it; a used block without a valid object is garbage
    u64 magic;
    u64 previous_size;  // derived
    u64 next_free;      // heap position + 1; derived
    u64 previous_free;  // heap position + 1; derived
};
static_assert(sizeof(Block) == 64, "layout");

// ---- the head of the segment -------------------------------------------------------------------------------------
struct Header {
    alignas(64) atomic<u64> magic;  // written last by the creator
    u32 version;
    u32 node;
    u64 total_bytes;
    u32 max_lanes;
    u32 ring_bytes;  // a power of two
    u32 max_rings;
    u32 max_slots;
    u64 lanes_at;
    u64 directory_at;  // u32 [dest][src]: ring index + 1, or 0
    u64 ring_controls_at;
    u64 rings_at;
    u64 slots_at;
    u64 heap_at;
    u64 heap_bytes;
    atomic<u64> object_bytes;  // how much of the heap objects may fill; the rest is for frames (STORE-6)

    alignas(64) pthread_mutex_t mutex;

    // How far each table has ever been used: scans stop there. Only grows.
    alignas(64) atomic<u32> lanes_high;
    atomic<u32> rings_high;
    atomic<u32> slots_high;

    // Derived, guarded by the mutex.
    alignas(64) u32 free_ring;  // index + 1
    u32 free_slot;              // index + 1
    atomic<u32> rings_used;
    atomic<u32> slots_used;
    atomic<u64> heap_used;
    atomic<u64> repairs;  // how often a holder of the mutex had died
    u64 bin_bits[kHeapBins / 64];
    u64 bins[kHeapBins];  // heap position + 1
};

}  // namespace hpc
