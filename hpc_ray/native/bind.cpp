// bind: the core as the Python module hpc_ray._core; the only file that sees Python.
//
// BIND-1 (no Python under a lock): no Python code, and nothing that may start the garbage collector, runs while one of
//   the core's mutexes is held: a sink makes bytes objects (never tracked by the collector) and nothing else.
// BIND-2 (waiting without the GIL): whatever may wait for another process or thread first releases the GIL.
// BIND-3 (lifetime): Pin and WriteBuffer hold the lane, the lane holds the segment; a memoryview or array made from
//   them holds them. So memory is never unmapped under a reader.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <system_error>

#include "frames.h"
#include "lane.h"
#include "mapped_file.h"
#include "mpi_stream.h"
#include "process.h"
#include "reclaim.h"

namespace nb = nanobind;
using namespace hpc;

namespace {

PyObject* g_arena_full = nullptr;

// A bytes-like argument; bytes objects without the buffer protocol's detour.
class Payload {
  public:
    explicit Payload(nb::handle object) {
        if (PyBytes_CheckExact(object.ptr())) {
            data = PyBytes_AS_STRING(object.ptr());
            bytes = u64(PyBytes_GET_SIZE(object.ptr()));
        } else {
            if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
            held_ = true;
            data = static_cast<const char*>(view_.buf);
            bytes = u64(view_.len);
        }
    }
    ~Payload() {
        if (held_) PyBuffer_Release(&view_);
    }
    Payload(const Payload&) = delete;
    Payload& operator=(const Payload&) = delete;
    const char* data;
    u64 bytes;

  private:
    Py_buffer view_;
    bool held_ = false;
};

// Collects frames as bytes objects (BIND-1); lists and tuples are made after the locks are gone.
class Collector final : public FrameSink {
  public:
    bool take(u64 src, u64, const char* payload, u64 bytes) override {
        PyObject* object = PyBytes_FromStringAndSize(payload, Py_ssize_t(bytes));
        if (!object) {
            failed_ = true;
            return false;
        }
        frames_.push_back({src, object});
        return true;
    }
    ~Collector() {
        for (Taken& frame : frames_) Py_XDECREF(frame.payload);
    }
    // [(src, payload)]
    nb::object result() {
        check();
        nb::object result = nb::steal(PyList_New(Py_ssize_t(frames_.size())));
        if (!result.is_valid()) throw nb::python_error();
        nb::object src;
        u64 src_value = 0;
        for (std::size_t i = 0; i < frames_.size(); i++) {
            Taken& frame = frames_[i];
            if (!src.is_valid() || src_value != frame.src) {
                src = nb::steal(PyLong_FromUnsignedLongLong(frame.src));
                src_value = frame.src;
            }
            PyObject* tuple = PyTuple_New(2);
            if (!tuple || !src.is_valid()) throw nb::python_error();
            PyTuple_SET_ITEM(tuple, 0, nb::object(src).release().ptr());
            PyTuple_SET_ITEM(tuple, 1, frame.payload);
            frame.payload = nullptr;
            PyList_SET_ITEM(result.ptr(), Py_ssize_t(i), tuple);
        }
        return result;
    }
    nb::object payloads() {
        check();
        nb::list result;
        for (Taken& frame : frames_) {
            result.append(nb::steal(frame.payload));
            frame.payload = nullptr;
        }
        return result;
    }
    bool empty() const { return frames_.empty() && !failed_; }

  private:
    struct Taken {
        u64 src;
        PyObject* payload;
    };
    void check() {
        if (!failed_) return;
        // The frames taken so far are gone from the rings: give those, and let the next call meet the failure.
        if (frames_.empty()) throw nb::python_error();
        PyErr_Clear();
    }
    std::vector<Taken> frames_;
    bool failed_ = false;
};

// Collects frames by the node that they are for.
class Packer final : public FrameSink {
  public:
    bool take(u64 src, u64 dest, const char* payload, u64 bytes) override {
        const u32 node = address_node(dest);
        try {
            if (nodes_.empty() || nodes_[last_].node != node) find(node);
            append_frame(nodes_[last_].frames, src, dest, payload, bytes);
        } catch (const std::bad_alloc&) {
            failed_ = true;
            return false;
        }
        return true;
    }
    // [(node, frames)]
    nb::object result() {
        if (failed_ && nodes_.empty()) throw std::bad_alloc();  // else the next call meets it again
        nb::list result;
        for (const Node& node : nodes_)
            if (!node.frames.empty()) result.append(nb::make_tuple(node.node, nb::bytes(node.frames.data(), node.frames.size())));
        return result;
    }
    bool empty() const { return nodes_.empty() && !failed_; }

  private:
    struct Node {
        u32 node;
        std::string frames;
    };
    void find(u32 node) {
        for (last_ = 0; last_ < nodes_.size(); last_++)
            if (nodes_[last_].node == node) return;
        nodes_.push_back({node, {}});
    }
    std::vector<Node> nodes_;
    std::size_t last_ = 0;
    bool failed_ = false;
};

// Takes the whole frames at the beginning: those that `forward` does not want become tuples. (bytes taken, tuples)
template <typename Forward>
nb::object take_frames(const Payload& data, Forward forward) {
    nb::list others;
    u64 taken = 0;
    FrameView frame;
    while (first_frame(data.data + taken, data.bytes - taken, frame)) {
        if (!forward(frame)) others.append(nb::make_tuple(frame.src, frame.dest, nb::bytes(frame.payload, frame.bytes)));
        taken += kFrameHeadBytes + frame.bytes;
    }
    return nb::make_tuple(taken, others);
}

i64 deadline_of(nb::handle timeout) {
    if (timeout.is_none()) return kNever;
    double seconds = PyFloat_AsDouble(timeout.ptr());
    if (seconds == -1.0 && PyErr_Occurred()) throw nb::python_error();
    if (std::isnan(seconds)) throw std::invalid_argument("the timeout is not a number");
    if (seconds > 3e9) return kNever;
    return monotonic_ns() + (seconds > 0 ? i64(seconds * 1e9) : 0);
}

void check_limit(u64 limit) {
    if (limit == 0) throw std::invalid_argument("limit must be at least 1");
}

// Collector or Packer.
template <typename Sink>
nb::object receive_any(Lane& lane, nb::handle timeout, u64 limit, bool spin) {
    lane.check();
    check_limit(limit);
    Sink collector;
    if (!lane.try_enter_foreground()) {
        i64 deadline = deadline_of(timeout);
        bool entered;
        {
            nb::gil_scoped_release released;
            entered = lane.enter_foreground(deadline);
        }
        if (!entered) return collector.result();
    }
    struct Turn {
        Lane& lane;
        bool ours = true;
        ~Turn() {
            if (ours) lane.leave_foreground();
        }
    } turn{lane};
    lane.drain(collector, limit, true);
    if (!collector.empty()) return collector.result();
    const i64 deadline = deadline_of(timeout);
    if (deadline != kNever && deadline <= monotonic_ns()) return collector.result();
    for (;;) {
        Wait outcome;
        {
            nb::gil_scoped_release released;
            outcome = lane.wait_foreground(deadline, spin);
        }
        switch (outcome) {
            case Wait::kReady:
                lane.drain(collector, limit, true);
                if (!collector.empty()) return collector.result();
                break;
            case Wait::kInterrupted: {
                // The handler may itself receive, in our turn; and what it took may be what our caller waits for.
                const u64 drains = lane.foreground_drains();
                lane.leave_foreground();
                turn.ours = false;
                if (PyErr_CheckSignals() != 0) throw nb::python_error();
                {
                    nb::gil_scoped_release released;
                    turn.ours = lane.enter_foreground(deadline);
                }
                if (!turn.ours || lane.foreground_drains() != drains) return collector.result();
                break;
            }
            default:
                return collector.result();
        }
    }
}

nb::object receive_background(Lane& lane, nb::handle deadline_s, u64 limit) {
    lane.check();
    check_limit(limit);
    Collector collector;
    const i64 deadline = deadline_of(deadline_s);
    for (;;) {
        Wait outcome;
        {
            nb::gil_scoped_release released;
            outcome = lane.wait_background(deadline);
        }
        if (outcome != Wait::kReady) return collector.result();
        lane.drain(collector, limit, false);
        if (!collector.empty()) return collector.result();
    }
}

// Of the MPI that mpi4py has loaded: see _calls in transport/mpi.py.
Mpi mpi_of(const nb::dict& found) {
    auto number = [&](const char* name) { return nb::cast<u64>(found[name]); };
    Mpi mpi;
    auto function = [&](const char* name, auto& pointer) { pointer = reinterpret_cast<std::decay_t<decltype(pointer)>>(number(name)); };
    function("MPI_Issend", mpi.issend);
    function("MPI_Irecv", mpi.irecv);
    function("MPI_Test", mpi.test);
    function("MPI_Wait", mpi.wait);
    function("MPI_Cancel", mpi.cancel);
    function("MPI_Request_free", mpi.request_free);
    function("MPI_Get_count", mpi.get_count);
    mpi.comm = number("comm");
    mpi.byte = number("byte");
    mpi.request_null = number("request_null");
    mpi.request_bytes = number("request_bytes");
    mpi.status_bytes = number("status_bytes");
    mpi.source_at = number("source_at");
    mpi.any_source = nb::cast<int>(found["any_source"]);
    return mpi;
}

i64 nanoseconds(double seconds) { return i64(seconds * 1e9); }

// (whether anything moved, [(node, source, destination, payload)], [(node, code)])
nb::object stream_turn(MpiStream& stream, Lane* inbox, Lane* local, double spin_s, bool slept) {
    std::vector<MpiStream::Message> others;
    std::vector<MpiStream::Failure> failures;
    const i64 until = spin_s > 0 ? monotonic_ns() + nanoseconds(spin_s) : 0;
    const bool moved = stream.turn(inbox, local, until, slept, others, failures);
    nb::list messages, failed;
    for (const MpiStream::Message& m : others)
        messages.append(nb::make_tuple(m.node, m.src, m.dest, nb::bytes(m.payload.data(), m.payload.size())));
    for (const MpiStream::Failure& f : failures) failed.append(nb::make_tuple(f.node, f.code));
    return nb::make_tuple(moved, messages, failed);
}

nb::object unclaimed_list(const std::vector<Unclaimed>& unclaimed) {
    nb::list result;
    for (const Unclaimed& u : unclaimed)
        result.append(nb::make_tuple(nb::bytes(u.id, kObjectIdBytes), u.handle, u.owner));
    return result;
}

// One process's view of the arena: the lane's store, kept alive by it.
struct StoreView {
    std::shared_ptr<Lane> lane;
    Store& operator*() const {
        lane->check();
        return lane->store();
    }
    Store* operator->() const { return &**this; }
};

struct Pin {
    std::shared_ptr<Lane> lane;
    u64 handle;
    const char* data;
    u64 size;
    ~Pin() {
        if (lane && lane->usable()) lane->store().unpin(handle);
    }
    Pin(std::shared_ptr<Lane> l, u64 h, const char* d, u64 s) : lane(std::move(l)), handle(h), data(d), size(s) {}
    Pin(const Pin&) = delete;
};

struct WriteBuffer {
    std::shared_ptr<Lane> lane;
    char* data;
    u64 size;
};

int pin_getbuffer(PyObject* self, Py_buffer* view, int flags) {
    Pin* pin = nb::inst_ptr<Pin>(self);
    return PyBuffer_FillInfo(view, self, const_cast<char*>(pin->data), Py_ssize_t(pin->size), 1, flags);
}

int write_getbuffer(PyObject* self, Py_buffer* view, int flags) {
    WriteBuffer* buffer = nb::inst_ptr<WriteBuffer>(self);
    return PyBuffer_FillInfo(view, self, buffer->data, Py_ssize_t(buffer->size), 0, flags);
}

int mapped_getbuffer(PyObject* self, Py_buffer* view, int flags) {
    MappedFile* file = nb::inst_ptr<MappedFile>(self);
    static char nothing;
    return PyBuffer_FillInfo(view, self, file->data() ? file->data() : &nothing, Py_ssize_t(file->size()), !file->writable(),
                             flags);
}

PyType_Slot mapped_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(mapped_getbuffer)}, {0, nullptr}};
PyType_Slot pin_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(pin_getbuffer)}, {0, nullptr}};
PyType_Slot write_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(write_getbuffer)}, {0, nullptr}};

nb::object record_tuple(const ObjectRecord& r) {
    return nb::make_tuple(nb::bytes(r.id, kObjectIdBytes), r.handle, r.size, r.owner, r.creator, r.sealed, r.claimed);
}

void raise_arena_full(const ArenaFull& e) {
    nb::object error = nb::steal(PyObject_CallFunction(g_arena_full, "s", e.what()));
    if (!error.is_valid()) return;
    error.attr("asked_bytes") = e.asked_bytes;
    error.attr("largest_free_bytes") = e.largest_free_bytes;
    error.attr("free_bytes") = e.free_bytes;
    error.attr("capacity_bytes") = e.capacity_bytes;
    PyErr_SetObject(g_arena_full, error.ptr());
}

}  // namespace

NB_MODULE(_core, m) {
    nb::set_leak_warnings(false);
    m.doc() = "Shared memory of one node: segment, lanes, object store. See _core.pyi.";

    g_arena_full = PyErr_NewException("hpc_ray._core.ArenaFull", PyExc_MemoryError, nullptr);
    m.attr("ArenaFull") = nb::borrow(g_arena_full);
    nb::register_exception_translator([](const std::exception_ptr& p, void*) {
        try {
            std::rethrow_exception(p);
        } catch (const ArenaFull& e) {
            raise_arena_full(e);
        } catch (const std::system_error& e) {
            errno = e.code().value();
            PyErr_SetFromErrno(PyExc_OSError);
        }
    });

    m.attr("WELL_KNOWN_LANES") = kWellKnownLanes;
    m.attr("LINK_LANE") = kLinkLane;
    m.attr("OBJECT_ID_BYTES") = kObjectIdBytes;
    m.attr("LANE_OPEN") = int(kLaneOpen);
    m.attr("LANE_DEAD") = int(kLaneDead);

    m.def(
        "make_address",
        [](u32 node, u32 index, u32 incarnation) {
            if (node > 0xffff || index > 0xffff) throw std::invalid_argument("node and index have 16 bits each");
            return make_address(node, index, incarnation);
        },
        nb::arg("node"), nb::arg("index"), nb::arg("incarnation"));
    m.def("split_address", [](u64 address) {
        return nb::make_tuple(address_node(address), address_index(address), address_incarnation(address));
    });
    m.def(
        "pack_frame",
        [](u64 src, u64 dest, nb::handle payload) {
            Payload p(payload);
            std::string frame;
            append_frame(frame, src, dest, p.data, p.bytes);
            return nb::bytes(frame.data(), frame.size());
        },
        nb::arg("src"), nb::arg("dest"), nb::arg("payload"));
    m.def(
        "split_frames", [](nb::handle frames) { return take_frames(Payload(frames), [](const FrameView&) { return false; }); },
        nb::arg("frames"));
    m.def(
        "call_or_put_off",
        [](nb::handle untimely, nb::handle handler, int number, nb::handle frame) {
            if (nb::cast<bool>(untimely(frame)))
                PyErr_SetInterruptEx(number);
            else
                handler(number, frame);
        },
        nb::arg("untimely"), nb::arg("handler"), nb::arg("number"), nb::arg("frame").none());
    m.def("check_signals", [] {
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
    });
    m.def("set_parent_death_signal", &set_parent_death_signal, nb::arg("signal"));
    m.def("set_child_subreaper", &set_child_subreaper);

    nb::class_<MpiStream>(m, "MpiStream")
        .def(nb::new_([](const nb::dict& mpi, std::vector<int> ranks, u32 node, u64 chunk_bytes, u32 slots, u32 window, int tag,
                         double quiet_s, MpiStream::Ring ring) {
                 const MpiStream::Shape shape{chunk_bytes, slots, window, tag, nanoseconds(quiet_s)};
                 return std::make_shared<MpiStream>(mpi_of(mpi), std::move(ranks), node, shape, std::move(ring));
             }),
             nb::arg("mpi"), nb::arg("ranks"), nb::arg("node"), nb::kw_only(), nb::arg("chunk_bytes"), nb::arg("slots"),
             nb::arg("window"), nb::arg("tag"), nb::arg("quiet_s"), nb::arg("ring").none() = nb::none())
        .def(
            "queue",
            [](MpiStream& stream, u32 node, nb::handle frames) {
                Payload data(frames);
                stream.queue(node, data.data, data.bytes);
            },
            nb::arg("node"), nb::arg("frames"))
        .def("turn", &stream_turn, nb::arg("inbox").none(), nb::arg("local").none(), nb::arg("spin_s"), nb::arg("slept"))
        .def("forsake", &MpiStream::forsake, nb::arg("node"))
        .def("lose", &MpiStream::lose, nb::arg("node"))
        .def("close", &MpiStream::close)
        .def("has_moved", &MpiStream::has_moved)
        .def_prop_ro("arrived_bytes", &MpiStream::arrived)
        .def_prop_ro("queued_bytes", &MpiStream::queued)
        .def_prop_ro("sending", &MpiStream::sending)
        .def_prop_ro("looked_s", [](MpiStream& stream) { return double(stream.looked()) * 1e-9; })
        .def_prop_ro("silent_s", [](MpiStream& stream) { return double(stream.looked() - stream.moved()) * 1e-9; });

    nb::class_<Segment>(m, "Segment")
        .def(nb::new_([](u32 node, u64 arena_bytes, u32 max_lanes, u32 ring_bytes) {
                 return Segment::create({node, arena_bytes, max_lanes, ring_bytes});
             }),
             nb::kw_only(), nb::arg("node"), nb::arg("arena_bytes"), nb::arg("max_lanes") = 1024,
             nb::arg("ring_bytes") = 65536)
        .def_static("attach", &Segment::attach, nb::arg("fd"))
        .def_prop_ro("fd", &Segment::fd)
        .def_prop_ro("node", &Segment::node)
        .def_prop_ro("arena_bytes", [](Segment& s) { return s.header().object_bytes.load(); })
        .def_prop_ro("max_lanes", [](Segment& s) { return s.header().max_lanes; })
        .def_prop_ro("ring_bytes", [](Segment& s) { return s.header().ring_bytes; })
        .def(
            "open_lane", [](std::shared_ptr<Segment> s, int index) { return Lane::open(std::move(s), index); },
            nb::arg("index") = -1)
        .def("limit_objects", &Segment::limit_objects, nb::arg("size"))
        .def("mark_dead", &Segment::mark_dead, nb::arg("address"))
        .def("unread", &Segment::unread, nb::arg("address"), nb::arg("reader"))
        .def(
            "reclaim",
            [](Segment& s, u64 address) {
                std::vector<Unclaimed> unclaimed;
                {
                    nb::gil_scoped_release released;
                    unclaimed = reclaim(s, address);
                }
                return unclaimed_list(unclaimed);
            },
            nb::arg("address"))
        .def("is_open", &Segment::alive, nb::arg("address"))
        .def("lanes",
             [](Segment& s) {
                 nb::list result;
                 for (const LaneRecord& r : s.lanes()) result.append(nb::make_tuple(r.address, r.state, r.pid));
                 return result;
             })
        .def("statistics",
             [](Segment& s) {
                 SegmentStatistics t = s.statistics();
                 nb::dict d;
                 d["total_bytes"] = t.total_bytes;
                 d["resident_bytes"] = t.resident_bytes;
                 d["arena_bytes"] = t.heap_bytes;
                 d["arena_used_bytes"] = t.heap_used_bytes;
                 d["repairs"] = t.repairs;
                 d["lanes_open"] = t.lanes_open;
                 d["lanes_dead"] = t.lanes_dead;
                 d["rings_used"] = t.rings_used;
                 d["rings_capacity"] = t.rings_capacity;
                 d["slots_used"] = t.slots_used;
                 d["slots_capacity"] = t.slots_capacity;
                 return d;
             })
        .def("validate", &Segment::validate);

    nb::class_<Lane>(m, "Lane")
        .def_prop_ro("address", &Lane::address)
        .def_prop_ro("closed", &Lane::closed)
        .def_prop_rw(
            "eager", [](Lane& lane) { return lane.eager.load(); }, [](Lane& lane, int value) { lane.eager = value; })
        .def(
            "send",
            [](Lane& lane, u64 dest, nb::handle payload) {
                Payload p(payload);
                return lane.send(dest, p.data, p.bytes);
            },
            nb::arg("dest"), nb::arg("payload"))
        .def(
            "forward_frames",
            [](Lane& lane, nb::handle frames) {
                return take_frames(Payload(frames), [&lane](const FrameView& frame) {
                    if (!lane.forwards(frame.dest)) return false;
                    lane.forward(frame.src, frame.dest, frame.payload, frame.bytes);
                    return true;
                });
            },
            nb::arg("frames"))
        .def("flush", &Lane::flush)
        .def(
            "receive",
            [](Lane& lane, nb::handle timeout_s, u64 limit, bool spin) {
                return receive_any<Collector>(lane, timeout_s, limit, spin);
            },
            nb::arg("timeout_s").none() = nb::none(), nb::arg("limit") = 256, nb::arg("spin") = true)
        .def(
            "receive_frames",
            [](Lane& lane, nb::handle timeout_s, u64 limit, bool spin) {
                return receive_any<Packer>(lane, timeout_s, limit, spin);
            },
            nb::arg("timeout_s").none() = nb::none(), nb::arg("limit") = 256, nb::arg("spin") = true)
        .def(
            "receive_background",
            [](Lane& lane, nb::handle deadline, u64 limit) { return receive_background(lane, deadline, limit); },
            nb::arg("deadline").none() = nb::none(), nb::arg("limit") = 1024)
        .def(
            "wait_background",
            [](Lane& lane, nb::handle deadline_s) {
                lane.check();
                const i64 deadline = deadline_of(deadline_s);
                nb::gil_scoped_release released;
                return lane.wait_background(deadline) == Wait::kReady;
            },
            nb::arg("deadline").none() = nb::none())
        .def(
            "receive_from",
            [](Lane& lane, u64 src) {
                Collector collector;
                lane.drain_from(src, collector);
                return collector.payloads();
            },
            nb::arg("src"))
        .def("wake", &Lane::wake)
        .def("wake_background", &Lane::wake_background)
        .def(
            "close",
            [](Lane& lane, double timeout_s) {
                std::vector<Unclaimed> unclaimed;
                {
                    nb::gil_scoped_release released;
                    unclaimed = lane.close(timeout_s);
                }
                return unclaimed_list(unclaimed);
            },
            nb::arg("timeout_s") = 1.0)
        .def("statistics", [](Lane& lane) {
            LaneStatistics t = lane.statistics();
            nb::dict d;
            d["sent"] = t.sent;
            d["received"] = t.received;
            d["backlog_bytes"] = t.backlog_bytes;
            d["backlogged"] = t.backlogged;
            d["dropped"] = t.dropped;
            d["lost"] = t.lost;
            d["parks"] = t.parks;
            d["spins"] = t.spins;
            d["wakes"] = t.wakes;
            d["background_ticks"] = t.background_ticks;
            return d;
        });

    nb::class_<Pin>(m, "Pin", nb::type_slots(pin_slots))
        .def_ro("handle", &Pin::handle)
        .def("__len__", [](const Pin& pin) { return pin.size; });

    nb::class_<WriteBuffer>(m, "WriteBuffer", nb::type_slots(write_slots))
        .def("__len__", [](const WriteBuffer& buffer) { return buffer.size; });

    nb::class_<MappedFile>(m, "MappedFile", nb::type_slots(mapped_slots))
        .def(
            "__init__",
            [](MappedFile* self, const std::string& path, bool writable) {
                nb::gil_scoped_release released;
                new (self) MappedFile(path, writable);
            },
            nb::arg("path"), nb::kw_only(), nb::arg("writable") = false)
        .def("__len__", [](const MappedFile& file) { return file.size(); });

    nb::class_<StoreView>(m, "Store")
        .def(
            "__init__",
            [](StoreView* self, std::shared_ptr<Segment> segment, std::shared_ptr<Lane> lane) {
                if (&lane->segment() != segment.get())
                    throw std::invalid_argument("the lane was opened in another segment object");
                new (self) StoreView{std::move(lane)};
            },
            nb::arg("segment"), nb::arg("lane"))
        .def(
            "create",
            [](StoreView& s, nb::bytes object_id, u64 size, u64 owner) {
                if (object_id.size() != kObjectIdBytes)
                    throw std::invalid_argument("an object id has 28 bytes, not " + std::to_string(object_id.size()));
                return s->create(object_id.c_str(), size, owner);
            },
            nb::arg("object_id"), nb::arg("size"), nb::arg("owner"))
        .def(
            "create_on_disk",
            [](StoreView& s, nb::bytes object_id, u64 size, u64 owner) {
                if (object_id.size() != kObjectIdBytes)
                    throw std::invalid_argument("an object id has 28 bytes, not " + std::to_string(object_id.size()));
                return s->create_on_disk(object_id.c_str(), size, owner);
            },
            nb::arg("object_id"), nb::arg("size"), nb::arg("owner"))
        .def(
            "write_buffer",
            [](StoreView& s, u64 handle) {
                u64 size;
                char* data = s->write_address(handle, size);
                nb::object buffer = nb::cast(WriteBuffer{s.lane, data, size});
                nb::object view = nb::steal(PyMemoryView_FromObject(buffer.ptr()));
                if (!view.is_valid()) throw nb::python_error();
                return view;
            },
            nb::arg("handle"))
        .def(
            "prepare", [](StoreView& s, u64 handle, u64 offset, u64 size) { s->prepare(handle, offset, size); },
            nb::arg("handle"), nb::arg("offset"), nb::arg("size"))
        .def(
            "write",
            [](StoreView& s, u64 handle, u64 offset, nb::handle buffer) {
                Store& store = *s;
                Payload p(buffer);
                if (p.bytes < 65536) {
                    store.write(handle, offset, p.data, p.bytes);
                } else {
                    nb::gil_scoped_release released;
                    store.write(handle, offset, p.data, p.bytes);
                }
            },
            nb::arg("handle"), nb::arg("offset"), nb::arg("buffer"))
        .def("seal", [](StoreView& s, u64 handle) { s->seal(handle); }, nb::arg("handle"))
        .def("abort", [](StoreView& s, u64 handle) { s->abort(handle); }, nb::arg("handle"))
        .def(
            "get",
            [](StoreView& s, u64 handle) -> nb::object {
                u64 size;
                const char* data = s->pin(handle, size);
                if (!data) return nb::none();
                return nb::cast(new Pin(s.lane, handle, data, size), nb::rv_policy::take_ownership);
            },
            nb::arg("handle"), nb::sig("def get(self, handle: int) -> Pin | None"))
        .def("delete", [](StoreView& s, u64 handle) { return u32(s->remove(handle)); }, nb::arg("handle"))
        .def("spill", [](StoreView& s, u64 handle) { return s->spill(handle); }, nb::arg("handle"))
        .def("victims",
             [](StoreView& s) {
                 nb::list result;
                 for (const Victim& v : s->victims()) result.append(nb::make_tuple(v.handle, v.size));
                 return result;
             })
        .def("room",
             [](StoreView& s) {
                 u64 free, largest;
                 s->room(free, largest);
                 return nb::make_tuple(free, largest);
             })
        .def("claim", [](StoreView& s, u64 handle) { return s->claim(handle); }, nb::arg("handle"))
        .def(
            "info",
            [](StoreView& s, u64 handle) -> nb::object {
                auto r = s->info(handle);
                if (!r) return nb::none();
                return nb::make_tuple(nb::bytes(r->id, kObjectIdBytes), r->size, r->owner, r->sealed, r->on_disk);
            },
            nb::arg("handle"))
        .def("list_objects",
             [](StoreView& s) {
                 nb::list result;
                 for (const ObjectRecord& r : s->list()) result.append(record_tuple(r));
                 return result;
             })
        .def("statistics",
             [](StoreView& s) {
                 StoreStatistics t = s->statistics();
                 nb::dict d;
                 d["capacity_bytes"] = t.capacity_bytes;
                 d["used_bytes"] = t.used_bytes;
                 d["largest_free_bytes"] = t.largest_free_bytes;
                 d["objects"] = t.objects;
                 d["creating"] = t.creating;
                 d["doomed"] = t.doomed;
                 d["pinned"] = t.pinned;
                 d["frames"] = t.frames;
                 d["spilled"] = t.spilled;
                 return d;
             })
        .def("trim", [](StoreView& s) {
            Store& store = *s;
            nb::gil_scoped_release released;
            return store.trim();
        });
}
