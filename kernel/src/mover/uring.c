/* io_uring by its system calls: one submission and one completion queue for vectored reads and writes. */
#include <errno.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mover/internal.h"

/* The kernel shares these words. A reader of a word sees everything that was written before the word. */
static uint32_t load(const uint32_t *word)
{
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

static void store(uint32_t *word, uint32_t value)
{
    __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

static int enter(const struct uring *uring, uint32_t submitted, unsigned flags)
{
    return (int)syscall(SYS_io_uring_enter, uring->fd, submitted, 0, flags, NULL, 0);
}

/* No signal for each completion: it waits for our next system call, and the queue says so. Linux 5.19. */
#define LAZY_COMPLETIONS (IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG)

static int setup(uint32_t entries, struct io_uring_params *parameters)
{
    *parameters = (struct io_uring_params){.flags = IORING_SETUP_CLAMP | LAZY_COMPLETIONS};
    int fd = (int)syscall(SYS_io_uring_setup, entries, parameters);
    if (fd < 0 && errno == EINVAL) {
        *parameters = (struct io_uring_params){.flags = IORING_SETUP_CLAMP};
        fd = (int)syscall(SYS_io_uring_setup, entries, parameters);
    }
    return fd;
}

static void *map(int fd, size_t bytes, uint64_t what)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)what);
    return memory == MAP_FAILED ? NULL : memory;
}

static bool map_rings(struct uring *uring, const struct io_uring_params *parameters)
{
    const struct io_sqring_offsets *sq = &parameters->sq_off;
    const struct io_cqring_offsets *cq = &parameters->cq_off;

    uring->rings_bytes = maximum(sq->array + parameters->sq_entries * sizeof(uint32_t),
                                 cq->cqes + parameters->cq_entries * sizeof(struct io_uring_cqe));
    uring->entries_bytes = parameters->sq_entries * sizeof(struct io_uring_sqe);
    uring->rings = map(uring->fd, uring->rings_bytes, IORING_OFF_SQ_RING);
    uring->entries = map(uring->fd, uring->entries_bytes, IORING_OFF_SQES);
    if (uring->rings == NULL || uring->entries == NULL) {
        return false;
    }
    uint8_t *rings = uring->rings;
    uring->submit_head = (void *)(rings + sq->head);
    uring->submit_tail = (void *)(rings + sq->tail);
    uring->submit_flags = (void *)(rings + sq->flags);
    uring->submit_entries = parameters->sq_entries;
    uring->submit_mask = parameters->sq_entries - 1;
    uring->complete_head = (void *)(rings + cq->head);
    uring->complete_tail = (void *)(rings + cq->tail);
    uring->complete_entries = parameters->cq_entries;
    uring->complete_mask = parameters->cq_entries - 1;
    uring->completions = (void *)(rings + cq->cqes);
    /* The queue holds indices of entries: always the same ones for us. */
    uint32_t *array = (void *)(rings + sq->array);
    for (uint32_t i = 0; i < parameters->sq_entries; i++) {
        array[i] = i;
    }
    return true;
}

/*
 * What the host cannot do without waiting is done by threads of the kernel, by default four for each processor. A host
 * that is slow needs one for each transfer. Linux 5.15; an older kernel keeps its default.
 */
#define KERNEL_THREADS 64u

static void allow_threads(const struct uring *uring)
{
    uint32_t limits[2] = {0, 0}; /* 0: keep it, and say what it is */
    if (syscall(SYS_io_uring_register, uring->fd, IORING_REGISTER_IOWQ_MAX_WORKERS, limits, 2) == 0 &&
        limits[0] < KERNEL_THREADS) {
        limits[0] = KERNEL_THREADS;
        limits[1] = 0;
        (void)syscall(SYS_io_uring_register, uring->fd, IORING_REGISTER_IOWQ_MAX_WORKERS, limits, 2);
    }
}

bool uring_open(struct uring *uring, uint32_t entries)
{
    struct io_uring_params parameters;

    *uring = (struct uring){.fd = setup(entries, &parameters)};
    if (uring->fd < 0) {
        return false;
    }
    /* One mapping for both queues: Linux 5.4. What is older is no better than the workers. */
    if ((parameters.features & IORING_FEAT_SINGLE_MMAP) == 0 || !map_rings(uring, &parameters)) {
        uring_close(uring);
        return false;
    }
    allow_threads(uring);
    return true;
}

void uring_close(struct uring *uring)
{
    if (uring->entries != NULL) {
        munmap(uring->entries, uring->entries_bytes);
    }
    if (uring->rings != NULL) {
        munmap(uring->rings, uring->rings_bytes);
    }
    if (uring->fd >= 0) {
        close(uring->fd);
    }
    *uring = (struct uring){.fd = -1};
}

bool uring_is_full(const struct uring *uring)
{
    return uring->fd >= 0 && uring->queued_tail - load(uring->submit_head) == uring->submit_entries;
}

bool uring_queue(struct uring *uring, const struct uring_transfer *transfer, uint64_t tag)
{
    /* As many as there are places for completions, so none is ever lost. */
    if (uring->fd < 0 || uring_is_full(uring) || uring->in_flight == uring->complete_entries) {
        return false;
    }
    uring->entries[uring->queued_tail & uring->submit_mask] = (struct io_uring_sqe){
        .opcode = transfer->writing ? IORING_OP_WRITEV : IORING_OP_READV,
        .flags = transfer->by_thread ? IOSQE_ASYNC : 0,
        .fd = transfer->fd,
        .off = transfer->offset,
        .addr = (uintptr_t)transfer->vector,
        .len = transfer->count,
        .user_data = tag,
    };
    uring->queued_tail++;
    uring->in_flight++;
    return true;
}

bool uring_submit(struct uring *uring)
{
    if (uring->fd < 0) {
        return true;
    }
    store(uring->submit_tail, uring->queued_tail);
    for (;;) {
        /* An entry that the kernel rejects ends a submission early; it is completed like the others. */
        uint32_t waiting = uring->queued_tail - load(uring->submit_head);
        if (waiting == 0) {
            return true;
        }
        int taken = enter(uring, waiting, 0);
        if (taken == 0 || (taken < 0 && errno != EINTR)) {
            return false;
        }
    }
}

bool uring_take_back(struct uring *uring, uint64_t *tag)
{
    if (uring->fd < 0 || uring->queued_tail == load(uring->submit_head)) {
        return false;
    }
    uring->queued_tail--;
    store(uring->submit_tail, uring->queued_tail);
    uring->in_flight--;
    *tag = uring->entries[uring->queued_tail & uring->submit_mask].user_data;
    return true;
}

bool uring_next(struct uring *uring, uint64_t *tag, int32_t *result)
{
    if (uring->fd < 0 || uring->in_flight == 0) {
        return false;
    }
    uint32_t head = *uring->complete_head;
    if (head == load(uring->complete_tail)) {
        if ((load(uring->submit_flags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW)) == 0) {
            return false;
        }
        enter(uring, 0, IORING_ENTER_GETEVENTS);
        if (head == load(uring->complete_tail)) {
            return false;
        }
    }
    const struct io_uring_cqe *completion = &uring->completions[head & uring->complete_mask];
    *tag = completion->user_data;
    *result = completion->res;
    store(uring->complete_head, head + 1);
    uring->in_flight--;
    return true;
}
