/* Vectored reads and writes of files by io_uring. */
#include <errno.h>
#include <linux/io_uring.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "mover/internal.h"

/* No signal for each completion: it waits for our next system call, and the queue says so. Linux 5.19. */
#define LAZY_COMPLETIONS (IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG)

/*
 * What the host cannot do without waiting is done by threads of the kernel, by default four for each processor. A host
 * that is slow needs one for each transfer. Linux 5.15; an older kernel keeps its default.
 */
#define KERNEL_THREADS 64u

static const uint8_t OPERATIONS[] = {IORING_OP_READV, IORING_OP_WRITEV, IORING_OP_READ_FIXED, IORING_OP_WRITE_FIXED};
static const uint8_t REGISTERS[] = {IORING_REGISTER_BUFFERS, IORING_REGISTER_IOWQ_MAX_WORKERS};
static const struct io_rings_use USE = {
    .operations = OPERATIONS,
    .registers = REGISTERS,
    .operation_count = sizeof OPERATIONS,
    .register_count = sizeof REGISTERS,
    .entry_flags = IOSQE_ASYNC,
};

static void allow_threads(const struct io_rings *rings)
{
    uint32_t limits[2] = {0, 0}; /* 0: keep it, and say what it is */
    if (syscall(SYS_io_uring_register, rings->fd, IORING_REGISTER_IOWQ_MAX_WORKERS, limits, 2) == 0 &&
        limits[0] < KERNEL_THREADS) {
        limits[0] = KERNEL_THREADS;
        limits[1] = 0;
        (void)syscall(SYS_io_uring_register, rings->fd, IORING_REGISTER_IOWQ_MAX_WORKERS, limits, 2);
    }
}

bool uring_open(struct io_rings *rings, uint32_t entries)
{
    if (!io_rings_open(rings, entries, LAZY_COMPLETIONS, &USE) &&
        (errno != EINVAL || !io_rings_open(rings, entries, 0, &USE))) {
        return false;
    }
    allow_threads(rings);
    return true;
}

bool uring_registered(const struct io_rings *rings, struct uring_memory *memory,
                      const struct uring_transfer *transfer)
{
    const struct iovec *part = transfer->vector;
    uintptr_t inner = (uintptr_t)part->iov_base - (uintptr_t)memory->start;

    if (rings->fd < 0 || !transfer->direct || transfer->count != 1 || inner >= memory->bytes ||
        part->iov_len > memory->bytes - inner) {
        return false;
    }
    /* Linux before 5.13 waits in the registration for all that is in flight. */
    if (memory->state == MEMORY_OFFERED && rings->in_flight == 0) {
        const struct iovec all = {.iov_base = memory->start, .iov_len = memory->bytes};
        /* Refused where the limit of locked memory (RLIMIT_MEMLOCK) is too low. */
        bool done = syscall(SYS_io_uring_register, rings->fd, IORING_REGISTER_BUFFERS, &all, 1) == 0;
        memory->state = done ? MEMORY_REGISTERED : MEMORY_REFUSED;
    }
    return memory->state == MEMORY_REGISTERED;
}

bool uring_queue(struct io_rings *rings, const struct uring_transfer *transfer, bool registered, uint64_t tag)
{
    struct io_uring_sqe *entry = io_rings_entry(rings);
    if (entry == NULL) {
        return false;
    }
    *entry = (struct io_uring_sqe){
        .opcode = transfer->writing ? IORING_OP_WRITEV : IORING_OP_READV,
        .flags = transfer->by_thread ? IOSQE_ASYNC : 0,
        .fd = transfer->fd,
        .off = transfer->offset,
        .addr = (uintptr_t)transfer->vector,
        .len = transfer->count,
        .user_data = tag,
    };
    if (registered) {
        entry->opcode = transfer->writing ? IORING_OP_WRITE_FIXED : IORING_OP_READ_FIXED;
        entry->addr = (uintptr_t)transfer->vector->iov_base;
        entry->len = (uint32_t)transfer->vector->iov_len;
        entry->buf_index = 0;
    }
    return true;
}

bool uring_take_back(struct io_rings *rings, uint64_t *tag)
{
    const struct io_uring_sqe *entry = io_rings_take_back(rings);
    if (entry == NULL) {
        return false;
    }
    *tag = entry->user_data;
    return true;
}
