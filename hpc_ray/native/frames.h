// frames: messages one after the other in one piece of memory, as they travel between nodes.
//
// Each is its head (source, destination, length of the payload: three u64 in the byte order of the machine) and its payload, without
// padding. Piece and frame need not end together: who cuts a piece anywhere puts it together again.
#pragma once

#include <string.h>

#include <string>

#include "layout.h"

namespace hpc {

constexpr u64 kFrameHeadBytes = 24;

struct FrameView {
    u64 src, dest;
    const char* payload;
    u64 bytes;
};

inline void append_frame(std::string& frames, u64 src, u64 dest, const void* payload, u64 bytes) {
    const u64 head[3] = {src, dest, bytes};
    static_assert(sizeof head == kFrameHeadBytes);
    frames.reserve(frames.size() + sizeof head + bytes);  // so that there is no half a frame when memory ends
    frames.append(reinterpret_cast<const char*>(head), sizeof head);
    frames.append(static_cast<const char*>(payload), bytes);
}

// The frame at the beginning; false when it is not there whole. It takes kFrameHeadBytes + bytes.
inline bool first_frame(const char* data, u64 size, FrameView& frame) {
    if (size < kFrameHeadBytes) return false;
    u64 head[3];
    memcpy(head, data, sizeof head);
    if (head[2] > size - kFrameHeadBytes) return false;
    frame = {head[0], head[1], data + kFrameHeadBytes, head[2]};
    return true;
}

}  // namespace hpc
