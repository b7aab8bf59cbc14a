#include "process.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/prctl.h>

#include <stdexcept>
#include <string>

namespace hpc {

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

}  // namespace hpc
