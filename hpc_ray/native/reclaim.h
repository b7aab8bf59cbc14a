// reclaim: gives back what a dead process held.
//
// RECLAIM-1 (the process is gone): the lane is DEAD, and its process has ended and been waited for: it touches the
//   segment no more. (Marking a living process dead is harmless; reclaiming it is not.)
// RECLAIM-2 (repeatable): each step can be done twice; the lane becomes FREE by one store at the very end. Killed half
//   way, the next call does it all again. Two at once are serialised by the mutex and look at the lane's word again.
// RECLAIM-3 (published means delivered): frames that the dead process published stay in their rings, and arena objects
//   they refer to go over to the receiver.
#pragma once

#include <vector>

#include "segment.h"

namespace hpc {

struct Unclaimed {
    char id[kObjectIdBytes];
    u64 handle;
    u64 owner;
};

// Frees rings, pins and objects of the lane, makes its index reusable, and returns the objects it had created and
// sealed that nobody has claimed and whose owner may live. Empty when there is no such dead lane (any more). Throws
// invalid_argument while the lane is open. Any process, any thread; holds the mutex for milliseconds at most.
std::vector<Unclaimed> reclaim(Segment& segment, u64 address);

}  // namespace hpc
