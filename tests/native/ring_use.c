/*
 * The engine's rings of io_uring take reads and writes of files, and the kernel refuses all else, whoever fills their
 * entries. usage: ring_use; 0 and "ok", or a message and 1.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "host/io_rings.h"
#include "mover/internal.h"

#define REQUIRE(condition) ((condition) ? (void)0 : die(#condition, __LINE__))

static void die(const char *what, int line)
{
    fprintf(stderr, "line %d: %s (errno %d)\n", line, what, errno);
    exit(1);
}

static int32_t result_of(struct io_rings *rings, const struct io_uring_sqe *wanted)
{
    uint64_t tag;
    int32_t result;

    struct io_uring_sqe *entry = io_rings_entry(rings);
    REQUIRE(entry != NULL);
    *entry = *wanted;
    int error;
    do {
        error = io_rings_wait(rings, 0);
    } while (error == EINTR);
    REQUIRE(error == 0 && io_rings_next(rings, &tag, &result));
    return result;
}

int main(void)
{
    static const uint8_t refused[] = {
        IORING_OP_NOP,      IORING_OP_POLL_ADD, IORING_OP_SENDMSG, IORING_OP_ACCEPT, IORING_OP_CONNECT,
        IORING_OP_FALLOCATE, IORING_OP_OPENAT,  IORING_OP_STATX,   IORING_OP_OPENAT2, IORING_OP_SPLICE,
        IORING_OP_UNLINKAT, IORING_OP_RENAMEAT, IORING_OP_SOCKET, IORING_OP_URING_CMD,
    };
    struct io_rings rings;
    char byte = 1;
    struct iovec part = {.iov_base = &byte, .iov_len = 1};

    REQUIRE(uring_open(&rings, 4));
    for (size_t i = 0; i < sizeof refused; i++) {
        struct io_uring_sqe entry = {.opcode = refused[i], .fd = -1};
        REQUIRE(result_of(&rings, &entry) == -EACCES);
    }
    int zeros = open("/dev/zero", O_RDONLY | O_CLOEXEC);
    struct io_uring_sqe read = {.opcode = IORING_OP_READV, .fd = zeros, .addr = (uintptr_t)&part, .len = 1};
    REQUIRE(result_of(&rings, &read) == 1 && byte == 0);
    /* A registration that is not ours, and other limits once there are some. */
    REQUIRE(syscall(SYS_io_uring_register, rings.fd, IORING_REGISTER_FILES, &zeros, 1) < 0 && errno == EACCES);
    REQUIRE(syscall(SYS_io_uring_register, rings.fd, IORING_REGISTER_RESTRICTIONS, NULL, 0) < 0);
    io_rings_close(&rings);
    puts("ok");
    return 0;
}
