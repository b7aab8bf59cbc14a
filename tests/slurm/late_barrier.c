/* Preloaded into Open MPI 5: rank 1 hears of the end of each barrier that it does not block in half a second after the others. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef void (*done_fn)(int status, void *data);
typedef int (*fence_fn)(const void *, size_t, const void *, size_t, done_fn, void *);

struct fence {
    done_fn done;
    void *data;
    int status;
};

static void *tell_late(void *argument) {
    struct fence *fence = argument;
    usleep(500000);
    fence->done(fence->status, fence->data);
    free(fence);
    return NULL;
}

static void on_done(int status, void *argument) {
    struct fence *fence = argument;
    pthread_t thread; /* PMIx's own must go on */
    fence->status = status;
    pthread_create(&thread, NULL, tell_late, fence);
    pthread_detach(thread);
}

int PMIx_Fence_nb(const void *processes, size_t count, const void *info, size_t infos, done_fn done, void *data) {
    fence_fn fence_nb = (fence_fn)dlsym(dlopen("libpmix.so.2", RTLD_NOW | RTLD_NOLOAD), "PMIx_Fence_nb");
    const char *rank = getenv("PMIX_RANK");
    struct fence *fence;
    if (rank == NULL || strcmp(rank, "1") != 0) {
        return fence_nb(processes, count, info, infos, done, data);
    }
    fence = malloc(sizeof *fence);
    fence->done = done;
    fence->data = data;
    return fence_nb(processes, count, info, infos, on_done, fence);
}
