#include "segment.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "heap.h"
#include "ring.h"
#include "store.h"

namespace hpc {

namespace {

constexpr u64 kFrameBytes = 16u << 20;  // STORE-6; sparse like all of it

std::runtime_error system_error(const char* what) {
    int error = errno;
    return std::runtime_error(std::string(what) + ": " + strerror(error));
}

struct Places {
    u64 lanes_at, directory_at, ring_controls_at, rings_at, slots_at, heap_at, total;
};

Places place(u32 max_lanes, u32 ring_bytes, u32 max_rings, u32 max_slots, u64 heap_bytes) {
    Places p;
    p.lanes_at = round_up(sizeof(Header), kPage);
    p.directory_at = round_up(p.lanes_at + u64(max_lanes) * sizeof(LaneEntry), kPage);
    p.ring_controls_at = round_up(p.directory_at + u64(max_lanes) * max_lanes * sizeof(u32), kPage);
    p.rings_at = round_up(p.ring_controls_at + u64(max_rings) * sizeof(RingControl), kPage);
    p.slots_at = round_up(p.rings_at + u64(max_rings) * ring_bytes, kPage);
    p.heap_at = round_up(p.slots_at + u64(max_slots) * sizeof(Slot), kHugePage);
    p.total = p.heap_at + heap_bytes;
    return p;
}

// At a multiple of kHugePage, as huge pages want it.
char* map(int fd, u64 bytes) {
    auto check = [](void* address) {
        if (address == MAP_FAILED) throw system_error("cannot map the node's shared memory (is ulimit -v set?)");
        return static_cast<char*>(address);
    };
    char* room = check(mmap(nullptr, bytes + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    char* base = reinterpret_cast<char*>(round_up(reinterpret_cast<u64>(room), kHugePage));
    check(mmap(base, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, fd, 0));
    char* end = base + round_up(bytes, kPage);
    if (base != room) munmap(room, u64(base - room));
    munmap(end, u64(room + bytes + kHugePage - end));
    return base;
}

atomic<u32> g_fork_generation{0};
const int g_fork_hook =
    pthread_atfork(nullptr, nullptr, [] { g_fork_generation.fetch_add(1, std::memory_order_relaxed); });

}  // namespace

u32 fork_generation() {
    (void)g_fork_hook;
    return g_fork_generation.load(std::memory_order_relaxed);
}

Segment::Segment(int fd, char* base, u64 bytes) : fd_(fd), base_(base), bytes_(bytes) {
    const Header& h = header();
    max_lanes_ = h.max_lanes;
    ring_bytes_ = h.ring_bytes;
    lanes_ = reinterpret_cast<LaneEntry*>(base_ + h.lanes_at);
    directory_ = reinterpret_cast<atomic<u32>*>(base_ + h.directory_at);
    rings_ = reinterpret_cast<RingControl*>(base_ + h.ring_controls_at);
    ring_data_ = base_ + h.rings_at;
    slots_ = reinterpret_cast<Slot*>(base_ + h.slots_at);
    // Best effort: neither is needed for correctness.
    madvise(base_ + h.heap_at, h.heap_bytes, MADV_HUGEPAGE);
    madvise(base_, bytes_, MADV_DONTDUMP);
}

Segment::~Segment() {
    munmap(base_, bytes_);
    close(fd_);
}

std::shared_ptr<Segment> Segment::create(const SegmentOptions& options) {
    if (options.node > 0xffff) throw std::invalid_argument("node must be below 65536");
    if (options.max_lanes < 64 || options.max_lanes > kMaxLanes || options.max_lanes % 64 != 0)
        throw std::invalid_argument("max_lanes must be a multiple of 64 between 64 and 1024");
    if (options.ring_bytes < 1024 || options.ring_bytes > (64u << 20) ||
        (options.ring_bytes & (options.ring_bytes - 1)) != 0)
        throw std::invalid_argument("ring_bytes must be a power of two between 1024 and 64 MiB");
    if (options.arena_bytes > (u64(1) << 46)) throw std::invalid_argument("arena_bytes is absurdly large");

    const u64 object_bytes = round_up(options.arena_bytes < 65536 ? 65536 : options.arena_bytes, kPage);
    const u64 heap_bytes = object_bytes + kFrameBytes;
    u32 max_slots = 65536;  // a spilled object keeps its slot
    while (max_slots < (1u << 22) && u64(max_slots) * 1024 < heap_bytes) max_slots *= 2;
    u32 max_rings = options.max_lanes * 64;
    Places p = place(options.max_lanes, options.ring_bytes, max_rings, max_slots, heap_bytes);

    int fd = memfd_create("hpc_ray", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) throw system_error("memfd_create");
    if (ftruncate(fd, off_t(p.total)) != 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0) {
        auto error = system_error("cannot size the node's shared memory");
        close(fd);
        throw error;
    }
    char* base;
    try {
        base = map(fd, p.total);
    } catch (...) {
        close(fd);
        throw;
    }
    Header& h = *reinterpret_cast<Header*>(base);
    h.version = kLayoutVersion;
    h.node = options.node;
    h.total_bytes = p.total;
    h.max_lanes = options.max_lanes;
    h.ring_bytes = options.ring_bytes;
    h.max_rings = max_rings;
    h.max_slots = max_slots;
    h.lanes_at = p.lanes_at;
    h.directory_at = p.directory_at;
    h.ring_controls_at = p.ring_controls_at;
    h.rings_at = p.rings_at;
    h.slots_at = p.slots_at;
    h.heap_at = p.heap_at;
    h.heap_bytes = heap_bytes;
    h.object_bytes.store(object_bytes);

    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    int rc = pthread_mutex_init(&h.mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);

    std::shared_ptr<Segment> segment(new Segment(fd, base, p.total));
    if (rc != 0) throw std::runtime_error("the system has no robust process-shared mutexes");
    heap_format(*segment);
    h.magic.store(kMagic, std::memory_order_release);  // SEGMENT-1
    return segment;
}

std::shared_ptr<Segment> Segment::attach(int fd) {
    struct stat status;
    if (fstat(fd, &status) != 0) throw system_error("cannot attach: the fd");
    u64 bytes = u64(status.st_size);
    if (bytes < sizeof(Header))
        throw std::invalid_argument("cannot attach: the fd is no hpc_ray segment (it has " + std::to_string(bytes) +
                                    " bytes)");
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (own < 0) throw system_error("cannot attach: dup");
    char* base;
    try {
        base = map(own, bytes);
    } catch (...) {
        close(own);
        throw;
    }
    const Header& h = *reinterpret_cast<Header*>(base);
    std::string problem;
    if (h.magic.load(std::memory_order_acquire) != kMagic) {
        problem = "the fd is no hpc_ray segment (wrong magic)";
    } else if (h.version != kLayoutVersion) {
        problem = "it has layout version " + std::to_string(h.version) + ", this process was built for " +
                  std::to_string(kLayoutVersion) + ": processes of one node must use the same hpc_ray";
    } else if (h.total_bytes != bytes || h.max_lanes == 0 || h.max_lanes > kMaxLanes ||
               place(h.max_lanes, h.ring_bytes, h.max_rings, h.max_slots, h.heap_bytes).total != bytes) {
        problem = "its sizes contradict one another (" + std::to_string(bytes) + " bytes mapped)";
    }
    if (!problem.empty()) {
        munmap(base, bytes);
        close(own);
        throw std::invalid_argument("cannot attach: " + problem);
    }
    return std::shared_ptr<Segment>(new Segment(own, base, bytes));
}

Segment::Lock::Lock(Segment& segment) : segment_(segment) {
    pthread_mutex_t& mutex = segment.header().mutex;
    int rc = pthread_mutex_lock(&mutex);
    if (rc == 0) return;
    if (rc != EOWNERDEAD) throw std::runtime_error(std::string("the node's shared memory is damaged and cannot be used any more: ") + strerror(rc));
    try {
        segment.repair();
    } catch (...) {
        pthread_mutex_unlock(&mutex);  // not consistent: from now on everybody's lock fails, rather than using the damage
        throw;
    }
    pthread_mutex_consistent(&mutex);
}

Segment::Lock::~Lock() { pthread_mutex_unlock(&segment_.header().mutex); }

void Segment::repair() {  // SEGMENT-3
    header().repairs.fetch_add(1, std::memory_order_relaxed);
    ring_repair(*this);
    heap_repair(*this);
}

void Segment::limit_objects(u64 bytes) {
    const u64 most = header().heap_bytes - kFrameBytes;
    header().object_bytes.store(bytes < most ? round_up(bytes, kPage) : most);
}

bool Segment::mark_dead(u64 address) {
    u32 index = address_index(address);
    if (address_node(address) != node() || index >= max_lanes_)
        throw std::invalid_argument("not an address of this node");
    u64 expected = lane_word(kLaneOpen, address_incarnation(address));
    return lane(index).word.compare_exchange_strong(expected, lane_word(kLaneDead, address_incarnation(address)));
}

bool Segment::unread(u64 address, u32 reader) const {
    const u32 index = address_index(address);
    if (address_node(address) != node() || index >= max_lanes_ || reader >= max_lanes_)
        throw std::invalid_argument("not a lane of this node");
    const u32 found = directory(reader, index).load();
    if (found == 0 || lane_state(lane(reader).word.load()) != kLaneOpen) return false;
    const RingControl& c = ring(found - 1);
    const char* data = ring_data(found - 1);
    for (;;) {  // what is at its head comes first: frames of a successor are behind those of the dead one
        const u64 head = c.head.load(), tail = c.tail.load();
        if (head == tail) return false;
        Frame frame;
        memcpy(&frame, data + (head & (ring_bytes() - 1)), 8);
        u64 at = head;
        if (frame.flags & kFramePad) at += frame.length;
        const bool padded_end = at == tail;
        if (!padded_end) memcpy(&frame, data + (at & (ring_bytes() - 1)), sizeof frame);
        if (c.head.load() != head) continue;  // its reader has gone on meanwhile: it may have been overwritten
        return !padded_end && frame.src == address;
    }
}

bool Segment::alive(u64 address) const {
    u32 index = address_index(address);
    if (address_node(address) != node() || index >= max_lanes_) return false;
    u64 word = lane(index).word.load();
    if (lane_state(word) != kLaneOpen) return false;
    return address_incarnation(address) == 0 || address_incarnation(address) == lane_incarnation(word);
}

std::vector<LaneRecord> Segment::lanes() const {
    std::vector<LaneRecord> records;
    for (u32 i = 0, high = lanes_high(); i < high; i++) {
        u64 word = lane(i).word.load();
        if (lane_state(word) == kLaneFree) continue;
        records.push_back({make_address(node(), i, lane_incarnation(word)), lane_state(word), lane(i).pid.load()});
    }
    return records;
}

SegmentStatistics Segment::statistics() {
    Lock lock(*this);
    Header& h = header();
    SegmentStatistics s{};
    s.total_bytes = h.total_bytes;
    struct stat status;
    if (fstat(fd_, &status) == 0) s.resident_bytes = u64(status.st_blocks) * 512;
    s.heap_bytes = h.object_bytes.load();
    s.heap_used_bytes = h.heap_used.load();
    s.repairs = h.repairs.load();
    for (const LaneRecord& record : lanes()) (record.state == kLaneOpen ? s.lanes_open : s.lanes_dead)++;
    s.rings_used = h.rings_used.load();
    s.rings_capacity = h.max_rings;
    s.slots_used = h.slots_used.load();
    s.slots_capacity = h.max_slots;
    return s;
}

std::vector<std::string> Segment::validate() {
    Lock lock(*this);
    std::vector<std::string> problems;
    ring_validate(*this, problems);
    heap_validate(*this, problems);
    return problems;
}

}  // namespace hpc
