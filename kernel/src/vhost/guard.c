/*
 * Memory that may vanish: the guest's memory is files of the front end, which can make them shorter at any moment.
 *
 * A touch of mapped memory that its file does not have any more is a SIGBUS, in whichever thread it happens: a ring's, a
 * worker's, one of Python that copies a parked write. The handler puts memory of ours, zeros, in the place of all of the
 * mapping, sets a flag and returns, so that the thread goes on as if it had read zeros. The ring's thread sees the flag and
 * ends the ring. System calls on such memory fail with EFAULT instead. Every other SIGBUS is what it was before.
 *
 * pread and pwrite of the file for each descriptor would need no handler, but cost a system call for each
 * of the ring's words and a copy of all data.
 */
#include <errno.h>
#include <signal.h>
#include <sys/mman.h>

#include "vhost/internal.h"

#define GUARDS_MAX 1024u

struct mapping_guard {
    _Atomic(uintptr_t) start; /* 0: free. The others hold while it is set */
    size_t length;
    atomic_bool *gone;
};

static struct mapping_guard guards[GUARDS_MAX];
static pthread_mutex_t guards_lock = PTHREAD_MUTEX_INITIALIZER; /* of changes */
static struct sigaction before;
static bool installed;

/* Only calls that a signal handler may make. */
static void replace(int number, siginfo_t *info, void *context)
{
    uintptr_t address = (uintptr_t)info->si_addr;
    int saved = errno;
    (void)context;

    for (uint32_t i = 0; i < GUARDS_MAX; i++) {
        uintptr_t start = atomic_load(&guards[i].start);
        if (start == 0 || address < start || address - start >= guards[i].length) {
            continue;
        }
        void *zeros = mmap((void *)start, guards[i].length, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
        if (zeros != MAP_FAILED) {
            atomic_store(guards[i].gone, true);
            errno = saved;
            return;
        }
    }
    /* Not ours: the same touch meets what was there before. */
    sigaction(number, &before, NULL);
    errno = saved;
}

static bool install(void)
{
    if (!installed) {
        struct sigaction action = {.sa_sigaction = replace, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
        sigemptyset(&action.sa_mask);
        installed = sigaction(SIGBUS, &action, &before) == 0;
    }
    return installed;
}

static bool guard_under_lock(void *memory, size_t length, atomic_bool *gone)
{
    if (!install()) {
        return false;
    }
    for (uint32_t i = 0; i < GUARDS_MAX; i++) {
        if (atomic_load(&guards[i].start) == 0) {
            guards[i].length = length;
            guards[i].gone = gone;
            atomic_store(&guards[i].start, (uintptr_t)memory);
            return true;
        }
    }
    return false;
}

bool vhost_guard(void *memory, size_t length, atomic_bool *gone)
{
    pthread_mutex_lock(&guards_lock);
    bool done = guard_under_lock(memory, length, gone);
    pthread_mutex_unlock(&guards_lock);
    return done;
}

void vhost_unguard(void *memory)
{
    pthread_mutex_lock(&guards_lock);
    for (uint32_t i = 0; i < GUARDS_MAX; i++) {
        if (atomic_load(&guards[i].start) == (uintptr_t)memory) {
            atomic_store(&guards[i].start, 0);
        }
    }
    pthread_mutex_unlock(&guards_lock);
}
