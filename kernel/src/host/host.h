/*
 * Host files and locks on ranges of them: complete reads and writes, O_DIRECT, growth, holes, durability. host/ knows
 * neither disks nor layers nor formats: a host file is a descriptor and bytes at offsets.
 */
#ifndef TAPFS_HOST_H
#define TAPFS_HOST_H

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/uio.h>

#include "common.h"

/* ---- host/range_lock.c: readers and writers of overlapping ranges of one host file, first come first served */

struct range_holder {
    struct range_holder *previous, *next;
    uint64_t start, end;
    const void *object;
    bool exclusive;
};

struct range_lock {
    pthread_mutex_t mutex;
    pthread_cond_t released;
    struct range_holder *first, *last;
    unsigned waiting;
};

TAPFS_INTERNAL void range_lock_init(struct range_lock *lock);
TAPFS_INTERNAL void range_lock_destroy(struct range_lock *lock);
/* False only with `try`: it would wait. */
TAPFS_INTERNAL bool range_lock_acquire(struct range_lock *lock, struct range_holder *holder, bool try);
TAPFS_INTERNAL void range_lock_release(struct range_lock *lock, struct range_holder *holder);

/* ---- host/file.c: one host file. All return 0 or an errno. */

/* No host gives this for a file: it has become shorter than it was known to be, so somebody has truncated it. */
#define HOST_CUT EBADFD

struct host_mapping;

struct host_file {
    int fd;
    bool writable;
    bool block_device;
    bool ranged;         /* opened with O_DIRECT: every write takes the range lock, for good */
    bool in_memory;      /* on tmpfs: no transfer waits for a disk */
    bool sparse;         /* when it was opened the host had less of it than it is long: there may be holes */
    uint32_t memory_alignment, offset_alignment; /* what the host demands of O_DIRECT; powers of two */
    uint32_t direct_block; /* what direct.c transfers, and the range lock holds: at least as much as both */
    atomic_bool refuses_nowait[2]; /* RWF_NOWAIT in reads and in writes */
    atomic_bool takes_nowait;      /* a read with RWF_NOWAIT has brought something */
    atomic_bool refuses_allocate; /* the host cannot set space aside */
    atomic_bool direct;  /* O_DIRECT is on, as far as we are concerned */
    atomic_bool dirty;   /* a write has ended since the last fdatasync began */
    int sync_error;      /* the first failure of fdatasync; under sync_lock */
    _Atomic uint64_t known_size; /* the file has been at least as long, and nothing here shortens it */
    /* The host found no hole between them. It may have one by now that others made: it is read as data then. */
    _Atomic uint64_t solid_from, solid_until;
    _Atomic uint64_t cut_at;     /* what is behind this was lost; UINT64_MAX: nothing that we know of */
    /* One byte a block: 0, it is not here. NULL: all of the file is. The owner sets a byte when the block is written. */
    const uint8_t *present;
    uint64_t present_block_bytes, present_blocks;
    /* The file is bytes [start, start + window) of what the descriptor names; blocks that are present count from its start.
     * UINT64_MAX: all of it. Only of a file that is read, without O_DIRECT. */
    uint64_t start, window;
    _Atomic(struct host_mapping *) mapping; /* host/mapped.c; NULL: nobody has asked for it */
    pthread_rwlock_t extend_lock;
    pthread_mutex_t sync_lock;
    pthread_mutex_t direct_lock;
};

/* `direct`: the descriptor was opened with O_DIRECT. The descriptor stays the caller's. */
TAPFS_INTERNAL int host_file_new(int fd, bool direct, bool writable, struct host_file **file);
TAPFS_INTERNAL void host_file_free(struct host_file *file);
/* From now on the file is a range of what the descriptor names. Before any transfer. 0, or EINVAL: the range is impossible. */
TAPFS_INTERNAL int host_file_set_window(struct host_file *file, uint64_t start, uint64_t length);
/* Whether a transfer by the descriptor might go past the end of the file's window, where other bytes are. */
TAPFS_INTERNAL bool host_leaves_window(const struct host_file *file, uint64_t offset, uint64_t length);
/* `got` is less than `length` only at the end of the file or with an error; HOST_CUT where the file has had bytes of the
 * range that it has no more. With `nowait` also EAGAIN: the host says that it would have to be waited for; and
 * EOPNOTSUPP: it cannot be asked. */
TAPFS_INTERNAL int host_read(struct host_file *file, void *buffer, uint64_t offset, uint64_t length, bool nowait,
                             uint64_t *got);
/* Under O_DIRECT the caller holds the range lock of the blocks that the range touches. */
TAPFS_INTERNAL int host_write(struct host_file *file, const void *buffer, uint64_t offset, uint64_t length);
/* The same for a file without O_DIRECT, unless the host would have to be waited for: then EAGAIN or EOPNOTSUPP, as for
 * host_read. After any error a part may have been written. */
TAPFS_INTERNAL int host_write_nowait(struct host_file *file, const void *buffer, uint64_t offset, uint64_t length);
/* Buffered files only; the vector is used up. */
TAPFS_INTERNAL int host_write_vector(struct host_file *file, struct iovec *vector, int count, uint64_t offset);
/* CHUNK_BYTES of zeros, aligned. */
TAPFS_INTERNAL extern const uint8_t zero_chunk[];
/* Note that a write which did not go through here has ended, well or not; before it is reported. */
TAPFS_INTERNAL void host_wrote(struct host_file *file);
TAPFS_INTERNAL int host_punch(struct host_file *file, uint64_t offset, uint64_t length);
/* Have both files share the bytes, where the file system can; else an errno, and nothing is changed. */
TAPFS_INTERNAL int host_clone(struct host_file *target, uint64_t offset, const struct host_file *source,
                              uint64_t source_offset, uint64_t length);
TAPFS_INTERNAL int host_grow(struct host_file *file, uint64_t size);
/* Cut the file at `size`. Nobody else reads or writes what lies behind it. */
TAPFS_INTERNAL int host_shorten(struct host_file *file, uint64_t size);
/* Take space on the host for a range that lies inside the file; what it reads as does not change. */
TAPFS_INTERNAL int host_allocate(struct host_file *file, uint64_t offset, uint64_t length);
TAPFS_INTERNAL int host_sync(struct host_file *file);

/* ---- host/buffered.c: what of a file is there, and complete transfers of a descriptor without O_DIRECT */

/* Whether a block of the range is not here; of a read that meets one the error is ENODATA. */
TAPFS_INTERNAL bool host_absent(const struct host_file *file, uint64_t offset, uint64_t length);
/* `size` was asked for after `known`, a value of known_size: 0, or HOST_CUT once and for all. */
TAPFS_INTERNAL int host_judge_size(struct host_file *file, uint64_t known, uint64_t size);
TAPFS_INTERNAL int host_size(const struct host_file *file, uint64_t *size);
/* 0, or an error where the file has become shorter: what it has lost is no hole. */
TAPFS_INTERNAL int host_look_for_cut(struct host_file *file);
/* Where the host has data, or a hole, at or behind `offset`, at most `end`. What a host cannot tell is data. A search for
 * a hole may take as long as the file has extents or pages, so what one has passed over is not searched again. */
TAPFS_INTERNAL uint64_t host_next_data(const struct host_file *file, uint64_t offset, uint64_t end);
TAPFS_INTERNAL uint64_t host_next_hole(struct host_file *file, uint64_t offset, uint64_t end);
TAPFS_INTERNAL int buffered_read(const struct host_file *file, uint8_t *buffer, uint64_t offset, uint64_t length,
                                 uint64_t *got);
TAPFS_INTERNAL int buffered_write(const struct host_file *file, const uint8_t *buffer, uint64_t offset,
                                  uint64_t length);
/* The range will be read soon: a host that can brings it meanwhile. */
TAPFS_INTERNAL void host_expect(const struct host_file *file, uint64_t offset, uint64_t length);
/* Have the host begin to write what it holds in memory of a range, `length` 0: to the end of the file. Nothing is
 * durable for it. */
TAPFS_INTERNAL void host_start_writeback(const struct host_file *file, uint64_t offset, uint64_t length);
/* As host_read and host_write with `nowait`. */
TAPFS_INTERNAL int nowait_read(struct host_file *file, uint8_t *buffer, uint64_t offset, uint64_t length,
                               uint64_t *got);
TAPFS_INTERNAL int nowait_write(struct host_file *file, const uint8_t *buffer, uint64_t offset, uint64_t length);

/* ---- host/mapped.c: bytes of a file in memory where the host has them */

/* The most bytes that host_mapped gives. */
#define MAPPED_MAX (1u << 20)

/*
 * The bytes of a range of a file on tmpfs, where the host has all of its pages in memory now; else NULL. They change as
 * the file does, and are there until host_file_free. Who shortens the file takes them away: a touch is SIGBUS then, and a
 * system call on them fails with EFAULT.
 */
TAPFS_INTERNAL const uint8_t *host_mapped(struct host_file *file, uint64_t offset, uint64_t length);
/* Nobody looks at the bytes any more. */
TAPFS_INTERNAL void host_unmap(struct host_file *file);

/* ---- host/direct.c: the same under O_DIRECT; host_read and host_write choose */

TAPFS_INTERNAL int direct_read(struct host_file *file, uint8_t *buffer, uint64_t offset, uint64_t length,
                               uint64_t *got);
TAPFS_INTERNAL int direct_write(struct host_file *file, const uint8_t *buffer, uint64_t offset, uint64_t length);

#endif
