// process: the few system calls that tell of processes and threads, and tie a process to the one that started it. Any thread; no shared
// memory.
#pragma once

#include "layout.h"

namespace hpc {

// The calling process gets `signal` when the thread that forked it ends (0: no more). Throws runtime_error.
void set_parent_death_signal(int signal);
// Orphans among the descendants become children of the calling process. Throws runtime_error.
void set_child_subreaper();
// How many CPUs this process may run on.
int affinity_count();
// The kernel's numbers of the calling thread and its process, which are asked for once after each fork.
int thread_id();
int process_id();
// Processor time of a thread of this process; 0 if there is none of this number.
i64 thread_work_ns(int thread);
// Whether a thread of this process runs, or would if it had a core. 5 us.
bool thread_is_runnable(int thread);

}  // namespace hpc
