/*
 * Moves data between an engine disk and scattered memory at queue depth: at once where the host has the
 * bytes in its memory, by io_uring where the kernel has it, by worker threads elsewhere.
 *
 * A mover belongs to one thread, its owner: every function but move_now is called by that thread alone.
 *
 * A move counts as a running request of the disk until mover_ended has brought it, so an owner with moves in flight
 * keeps taking them. It neither quiesces the disk nor waits for somebody who does, nor does it call move_now itself.
 */
#ifndef TAPFS_MOVER_H
#define TAPFS_MOVER_H

#include <sys/uio.h>

#include "engine/internal.h"

struct mover;

/* One read or write. The caller sets the first block and keeps it, and what it points at, until it has ended. */
struct move {
    uint64_t offset, length; /* bytes of the disk */
    const struct iovec *parts; /* `length` bytes in all */
    uint32_t part_count;       /* 1 to MOVE_PARTS_MAX */
    bool writing;
    bool among_others; /* more moves are begun before mover_submit: io_uring does them all in one system call */
    void *context; /* the caller's */

    uint32_t flight; /* the mover's, between mover_pass or mover_lend and mover_passed */

    /* How it ended: DONE, MISS, RESERVE or FAILED. `outcome.done` counts finished bytes from the start of the move;
     * it is 0 before the first call. What is missing after MISS and RESERVE is as in tapfs_read and tapfs_write. */
    tapfs_outcome outcome;
    struct move *next; /* in the list of the ended */
};

#define MOVE_PARTS_MAX 512u
#define MOVE_BYTES_MAX (1u << 20)

/*
 * Which transfers io_uring does, where the kernel has it; the workers do the others. A direct write that io_uring has in
 * hand reaches the file even after a kill of the process, when somebody else may be writing there already. RING_ALL is
 * for owners that keep their successors away until then (tapfs/host/lock.py); RING_MORTAL leaves such writes to the workers.
 */
enum mover_ring { RING_NONE, RING_ALL, RING_MORTAL };

/* `depth`: moves that may be in flight at once, up to 4096; more than these just wait for a worker. `workers`: the most
 * threads for what cannot be done otherwise, at least 1; they start as they are needed. NULL with errno set. Without io_uring in the kernel the workers do it all. */
TAPFS_INTERNAL struct mover *mover_new(tapfs_disk *disk, uint32_t depth, uint32_t workers,
                                       enum mover_ring ring);
/* Nothing may be in flight. */
TAPFS_INTERNAL void mover_free(struct mover *mover);
/* Serve another disk from now on. Nothing may be in flight. */
TAPFS_INTERNAL void mover_set_disk(struct mover *mover, tapfs_disk *disk);
/* Memory that moves lie in: direct ones cost less there. It is pinned by the first of them, until mover_free. */
TAPFS_INTERNAL void mover_offer_memory(struct mover *mover, uint8_t *memory, size_t bytes);
/* Whether io_uring works here. */
TAPFS_INTERNAL bool mover_has_io_uring(const struct mover *mover);

/* Begin a move; true: it has ended already. Otherwise mover_ended brings it. */
TAPFS_INTERNAL bool mover_begin(struct mover *mover, struct move *move);
/* Hand what was begun to the host: once after a batch. */
TAPFS_INTERNAL void mover_submit(struct mover *mover);
/* Readable when mover_ended has something. io_uring may end a poll with EINTR though there was no signal. */
TAPFS_INTERNAL int mover_fd(const struct mover *mover);
/* The moves that have ended since, NULL if none; also clears mover_fd. */
TAPFS_INTERNAL struct move *mover_ended(struct mover *mover);
TAPFS_INTERNAL uint32_t mover_in_flight(const struct mover *mover);

/* A move that the owner's own ring can do: the memory is not the process's, but has a number in that ring. */
struct mover_pass {
    int fd;
    bool by_thread; /* a thread of the kernel is to do it: the submission itself would wait for this host */
    uint64_t offset; /* of the file */
};

/* Whether a move without parts is one transfer of one file, and nobody must look at its bytes; then it is in flight until
 * mover_passed, and the owner has its ring do it. False: it was not begun, and may be begun otherwise. */
TAPFS_INTERNAL bool mover_pass(struct mover *mover, struct move *move, struct mover_pass *pass);
/*
 * The bytes of a read without parts, where the host has them in one piece of its memory (host_mapped); then it is in
 * flight until mover_passed is told that all were taken, or an error: nothing else may be at that place meanwhile. NULL:
 * it was not begun, and is to be begun otherwise.
 */
TAPFS_INTERNAL const uint8_t *mover_lend(struct mover *mover, struct move *move);
/* What the ring made of it, bytes or a negated errno. False: it may be moved in part, and is to be begun otherwise. */
TAPFS_INTERNAL bool mover_passed(struct mover *mover, struct move *move, int32_t result);

/* Go on with a move from `outcome.done` in the calling thread, whatever it takes but the driver. Any thread. */
TAPFS_INTERNAL void move_now(tapfs_disk *disk, struct move *move);

#endif
