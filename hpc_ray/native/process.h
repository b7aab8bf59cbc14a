// process: the few system calls that tie a process to the one that started it. Any thread; no shared memory.
#pragma once

namespace hpc {

// The calling process gets `signal` when the thread that forked it ends (0: no more). Throws runtime_error.
void set_parent_death_signal(int signal);
// Orphans among the descendants become children of the calling process. Throws runtime_error.
void set_child_subreaper();
// How many CPUs this process may run on.
int affinity_count();

}  // namespace hpc
