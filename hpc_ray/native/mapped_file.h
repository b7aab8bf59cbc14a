// mapped_file: a whole file as memory. For objects whose bytes are not in the arena.
//
// MAPPED-1 (no descriptor): the file is closed once it is mapped, so mappings do not count against the limit of open
//   files; it may be unlinked, and stays good as long as it is mapped.
#pragma once

#include <string>

#include "layout.h"

namespace hpc {

class MappedFile {
  public:
    // Maps an existing file, which must not shrink. Any thread, without the GIL: it may wait for a disk. Throws
    // std::system_error with errno.
    MappedFile(const std::string& path, bool writable);
    ~MappedFile();
    MappedFile(const MappedFile&) = delete;
    MappedFile& operator=(const MappedFile&) = delete;

    char* data() const { return data_; }
    u64 size() const { return size_; }
    bool writable() const { return writable_; }

  private:
    char* data_ = nullptr;
    u64 size_ = 0;
    bool writable_;
};

}  // namespace hpc
