#include "process.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <stdexcept>
#include <string>

#include "segment.h"

namespace hpc {

namespace {

struct Ids {
    u32 generation = 0;
    int thread = 0, process = 0;
};

const Ids& ids() {
    thread_local Ids found;
    const u32 generation = fork_generation();
    if (found.thread == 0 || found.generation != generation)
        found = {generation, int(syscall(SYS_gettid)), int(getpid())};
    return found;
}

}  // namespace

void set_parent_death_signal(int signal) {
    if (prctl(PR_SET_PDEATHSIG, (unsigned long)signal, 0, 0, 0) != 0)
        throw std::runtime_error(std::string("PR_SET_PDEATHSIG: ") + strerror(errno));
}

void set_child_subreaper() {
    if (prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0)
        throw std::runtime_error(std::string("PR_SET_CHILD_SUBREAPER: ") + strerror(errno));
}

int affinity_count() {
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
    int count = CPU_COUNT(&set);
    return count < 1 ? 1 : count;
}

int thread_id() { return ids().thread; }

int process_id() { return ids().process; }

i64 thread_work_ns(int thread) {
    const clockid_t clock = clockid_t((~u32(thread) << 3) | 6);  // as the kernel numbers them: of a thread, and what the scheduler counts
    timespec t;
    if (clock_gettime(clock, &t) != 0) return 0;
    return i64(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

bool thread_is_runnable(int thread) {
    char path[64], text[256];
    snprintf(path, sizeof path, "/proc/self/task/%d/stat", thread);
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return false;
    const ssize_t size = read(file, text, sizeof text - 1);
    ::close(file);
    if (size <= 0) return false;
    text[size] = 0;
    const char* end = strrchr(text, ')');  // of the name, which may have anything in it
    return end != nullptr && end[1] == ' ' && end[2] == 'R';
}

}  // namespace hpc
