#include "mapped_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <system_error>

namespace hpc {

MappedFile::MappedFile(const std::string& path, bool writable) : writable_(writable) {
    const int fd = open(path.c_str(), (writable ? O_RDWR : O_RDONLY) | O_CLOEXEC);
    if (fd < 0) throw std::system_error(errno, std::generic_category(), path);
    struct stat status;
    int error = fstat(fd, &status) == 0 ? 0 : errno;
    if (error == 0 && status.st_size > 0) {
        size_ = u64(status.st_size);
        void* data = mmap(nullptr, size_, writable ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
        if (data == MAP_FAILED)
            error = errno;
        else
            data_ = static_cast<char*>(data);
    }
    close(fd);  // MAPPED-1
    if (error != 0) throw std::system_error(error, std::generic_category(), path);
    if (data_ && !writable) madvise(data_, size_, MADV_WILLNEED);  // best effort: reading starts now
}

MappedFile::~MappedFile() {
    if (data_) munmap(data_, size_);
}

}  // namespace hpc
