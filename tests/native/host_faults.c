/* An LD_PRELOAD library that stands between the engine and the host and injects faults.
 *
 * Only calls that come from the code of the engine are touched: the caller's return address must lie in
 * [faults.low, faults.high), which tests/faults/interposer.py sets. Rates are in parts per thousand of calls.
 * Memory that the engine allocates is filled with POISON, memory that it frees with FREED, so that a byte which
 * nobody has written is told from a byte of the disk. */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define POISON 0xa5
#define FREED 0xda
#define PUBLIC __attribute__((visibility("default")))

/* The order of the fields is repeated in tests/faults/interposer.py. */
struct faults {
    uint64_t low, high;               /* the engine's code */
    uint64_t metadata_low, metadata_high; /* the Python interpreter's code: the drivers' reads of metadata */
    uint32_t read, write, cut, truncate, punch, sync, memory, metadata; /* parts per thousand */
    uint32_t cut_bytes;               /* short transfers end at a multiple of this */
    uint32_t no_holes;                /* the host knows neither holes nor fallocate */
    uint32_t delay_microseconds;      /* every other transfer waits for up to this long, some for more */
    uint32_t poison;
    uint64_t seed;
    uint64_t injected;                /* how many faults there were */
    uint64_t refused_memory;          /* and how many of them were allocations */
    uint32_t *only;                   /* not null: the rate in here strikes once, at its call number `at`, and no other */
    uint64_t at;
    uint64_t calls;                   /* how often it was asked whether `only` strikes */
};

PUBLIC struct faults faults;

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *memory, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);
extern void __libc_free(void *memory);

static _Atomic uint64_t drawn;

/* splitmix64 of a counter: the same seed gives the same faults in a program of one thread. */
static uint64_t draw(void)
{
    uint64_t x = faults.seed + 0x9e3779b97f4a7c15u * (1 + atomic_fetch_add(&drawn, 1));
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

PUBLIC void faults_restart(uint64_t seed)
{
    faults.seed = seed;
    atomic_store(&drawn, 0);
}

static bool within(const void *caller, uint64_t low, uint64_t high)
{
    return (uintptr_t)caller >= low && (uintptr_t)caller < high;
}

static bool of_engine(const void *caller)
{
    return within(caller, faults.low, faults.high);
}

/* Whether the call that belongs to this field of `faults` fails. */
static bool strikes(const uint32_t *rate)
{
    if (faults.only != NULL) {
        if (rate != faults.only || __atomic_fetch_add(&faults.calls, 1, __ATOMIC_RELAXED) != faults.at) {
            return false;
        }
    } else if (*rate == 0 || draw() % 1000 >= *rate) {
        return false;
    }
    __atomic_fetch_add(&faults.injected, 1, __ATOMIC_RELAXED);
    return true;
}

static void maybe_wait(void)
{
    uint32_t most = faults.delay_microseconds;
    if (most != 0) {
        uint64_t x = draw();
        if (x % 2 == 0) {
            /* Now and then for so long that much else happens in the meantime. */
            usleep((useconds_t)((x >> 8) % (x % 32 == 0 ? 20 * most : most)));
        }
    }
}

/* How many bytes of a transfer the host moves: all, or a part of at least one byte. */
static size_t share(size_t length, uint64_t offset)
{
    uint64_t unit = faults.cut_bytes == 0 ? 1 : faults.cut_bytes;
    uint64_t first = unit - offset % unit; /* the first place where it may end */

    if (first >= length || !strikes(&faults.cut)) {
        return length;
    }
    return (size_t)(first + draw() % ((length - first - 1) / unit + 1) * unit);
}

static int write_error(void)
{
    static const int errors[] = {ENOSPC, EIO, EDQUOT, EFBIG};
    return errors[draw() % (sizeof errors / sizeof *errors)];
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (real == NULL) { \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name); \
    }

#define FAIL(number) \
    do { \
        errno = (number); \
        return -1; \
    } while (0)

PUBLIC ssize_t pread(int fd, void *buffer, size_t length, off_t offset)
{
    REAL(pread);
    const void *caller = __builtin_return_address(0);
    if (of_engine(caller)) {
        maybe_wait();
        if (strikes(&faults.read)) {
            FAIL(EIO);
        }
        ssize_t count = real(fd, buffer, share(length, (uint64_t)offset), offset);
        maybe_wait();
        return count;
    }
    if (within(caller, faults.metadata_low, faults.metadata_high) && strikes(&faults.metadata)) {
        FAIL(EIO);
    }
    return real(fd, buffer, length, offset);
}

PUBLIC ssize_t pread64(int fd, void *buffer, size_t length, off64_t offset) __attribute__((alias("pread")));

PUBLIC ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    REAL(pwrite);
    if (!of_engine(__builtin_return_address(0))) {
        return real(fd, buffer, length, offset);
    }
    maybe_wait();
    if (strikes(&faults.write)) {
        FAIL(write_error());
    }
    ssize_t count = real(fd, buffer, share(length, (uint64_t)offset), offset);
    maybe_wait();
    return count;
}

PUBLIC ssize_t pwrite64(int fd, const void *buffer, size_t length, off64_t offset) __attribute__((alias("pwrite")));

PUBLIC ssize_t pwritev(int fd, const struct iovec *vectors, int count, off_t offset)
{
    REAL(pwritev);
    if (!of_engine(__builtin_return_address(0))) {
        return real(fd, vectors, count, offset);
    }
    maybe_wait();
    if (strikes(&faults.write)) {
        FAIL(write_error());
    }
    /* A short one moves a part of one of its vectors, and those before it. */
    struct iovec part[64];
    size_t total = 0;
    for (int i = 0; i < count; i++) {
        total += vectors[i].iov_len;
    }
    size_t wanted = share(total, (uint64_t)offset);
    int used = 0;
    if (count > 64) {
        return real(fd, vectors, count, offset);
    }
    for (size_t left = wanted; used < count && left > 0; used++) {
        part[used] = vectors[used];
        if (part[used].iov_len > left) {
            part[used].iov_len = left;
        }
        left -= part[used].iov_len;
    }
    ssize_t done = real(fd, part, used, offset);
    maybe_wait();
    return done;
}

PUBLIC ssize_t pwritev64(int fd, const struct iovec *vectors, int count, off64_t offset)
    __attribute__((alias("pwritev")));

PUBLIC int ftruncate(int fd, off_t size)
{
    REAL(ftruncate);
    if (of_engine(__builtin_return_address(0)) && strikes(&faults.truncate)) {
        FAIL(write_error());
    }
    return real(fd, size);
}

PUBLIC int ftruncate64(int fd, off64_t size) __attribute__((alias("ftruncate")));

PUBLIC int fallocate(int fd, int mode, off_t offset, off_t length)
{
    REAL(fallocate);
    if (of_engine(__builtin_return_address(0))) {
        maybe_wait();
        if (faults.no_holes) {
            FAIL(EOPNOTSUPP);
        }
        if (strikes(&faults.punch)) {
            FAIL(draw() % 2 == 0 ? EIO : ENOSPC);
        }
    }
    return real(fd, mode, offset, length);
}

PUBLIC int fallocate64(int fd, int mode, off64_t offset, off64_t length) __attribute__((alias("fallocate")));

PUBLIC int fdatasync(int fd)
{
    REAL(fdatasync);
    if (of_engine(__builtin_return_address(0))) {
        maybe_wait();
        if (strikes(&faults.sync)) {
            FAIL(EIO);
        }
        /* What the process wrote is in the page cache, and no test here cuts the power. */
        return 0;
    }
    return real(fd);
}

static void *poisoned(void *memory)
{
    if (memory != NULL && faults.poison) {
        memset(memory, POISON, malloc_usable_size(memory));
    }
    return memory;
}

static bool refused(const void *caller, bool *ours)
{
    *ours = of_engine(caller);
    if (*ours && strikes(&faults.memory)) {
        __atomic_fetch_add(&faults.refused_memory, 1, __ATOMIC_RELAXED);
        errno = ENOMEM;
        return true;
    }
    return false;
}

PUBLIC void *malloc(size_t size)
{
    bool ours;
    if (refused(__builtin_return_address(0), &ours)) {
        return NULL;
    }
    void *memory = __libc_malloc(size);
    return ours ? poisoned(memory) : memory;
}

PUBLIC void *calloc(size_t count, size_t size)
{
    bool ours;
    return refused(__builtin_return_address(0), &ours) ? NULL : __libc_calloc(count, size);
}

PUBLIC void *realloc(void *memory, size_t size)
{
    bool ours;
    return refused(__builtin_return_address(0), &ours) ? NULL : __libc_realloc(memory, size);
}

PUBLIC void *aligned_alloc(size_t alignment, size_t size)
{
    bool ours;
    if (refused(__builtin_return_address(0), &ours)) {
        return NULL;
    }
    void *memory = __libc_memalign(alignment, size);
    return ours ? poisoned(memory) : memory;
}

PUBLIC void free(void *memory)
{
    if (memory != NULL && faults.poison && of_engine(__builtin_return_address(0))) {
        memset(memory, FREED, malloc_usable_size(memory));
    }
    __libc_free(memory);
}
