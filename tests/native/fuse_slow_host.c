/*
 * The FUSE server on a host that does not answer until it is told to. This program has transfer functions of its own
 * in the place of libc's: what the engine reads or writes behind HOT waits for `release`, and says when it is there.
 * So nothing here depends on time. io_uring, which goes past libc, is forbidden.
 *
 * usage: fuse_slow_host SCENARIO FILE [t]; 0 and "ok", or a message and 1. t: the host cannot tell whether it waits.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/fuse.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fuse/server.h"

#define BLOCK 4096u
#define HOT (64 * BLOCK) /* what the host has in memory */
#define BLOCKS 1024u
#define SIZE (HOT + BLOCKS * BLOCK)
#define NODE 2
#define THREADS 2
/* As in fuse/moves.c and fuse/internal.h. */
#define WORKERS 32u
#define READ_BUFFERS 64u

#define REQUIRE(condition) ((condition) ? (void)0 : die(#condition, __LINE__))

static tapfs_disk *disk;
static tapfs_fuse *server;
static int host = -1, device, session;
static bool cannot_tell;
static uint64_t next_unique = 2;

static void die(const char *what, int line)
{
    fprintf(stderr, "line %d: %s (errno %d)\n", line, what, errno);
    exit(1);
}

/* ---- the host */

static pthread_mutex_t host_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static unsigned arrived;
static bool released;

/* Every transfer of the host file; false: not now. */
static bool pass(int fd, off_t offset, int flags)
{
    if (fd != host) {
        return true;
    }
    if ((flags & RWF_NOWAIT) != 0 && (cannot_tell || offset >= (off_t)HOT)) {
        errno = cannot_tell ? EOPNOTSUPP : EAGAIN;
        return false;
    }
    if (offset >= (off_t)HOT) {
        pthread_mutex_lock(&host_lock);
        arrived++;
        pthread_cond_broadcast(&changed);
        while (!released) {
            pthread_cond_wait(&changed, &host_lock);
        }
        pthread_mutex_unlock(&host_lock);
    }
    return true;
}

static void wait_for_arrivals(unsigned count)
{
    pthread_mutex_lock(&host_lock);
    while (arrived < count) {
        pthread_cond_wait(&changed, &host_lock);
    }
    REQUIRE(arrived == count && !released);
    pthread_mutex_unlock(&host_lock);
}

static void release(void)
{
    pthread_mutex_lock(&host_lock);
    released = true;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&host_lock);
}

/* The kernel takes the offset as two words, of which a 64-bit machine uses the first. The host itself has all in
 * memory, so its RWF_NOWAIT is not asked. */
static ssize_t transfer(long number, int fd, const struct iovec *vector, int count, off_t offset, int flags)
{
    return pass(fd, offset, flags) ? syscall(number, fd, vector, count, offset, 0, flags & ~RWF_NOWAIT) : -1;
}

ssize_t preadv2(int fd, const struct iovec *vector, int count, off_t offset, int flags)
{
    return transfer(SYS_preadv2, fd, vector, count, offset, flags);
}

ssize_t pwritev2(int fd, const struct iovec *vector, int count, off_t offset, int flags)
{
    return transfer(SYS_pwritev2, fd, vector, count, offset, flags);
}

ssize_t pread(int fd, void *buffer, size_t length, off_t offset)
{
    struct iovec vector = {buffer, length};
    return transfer(SYS_preadv2, fd, &vector, 1, offset, 0);
}

ssize_t pwrite(int fd, const void *buffer, size_t length, off_t offset)
{
    struct iovec vector = {(void *)(uintptr_t)buffer, length};
    return transfer(SYS_pwritev2, fd, &vector, 1, offset, 0);
}

/* ---- the kernel */

static uint8_t byte_at(uint64_t offset)
{
    return (uint8_t)(offset / BLOCK * 7 + offset % 251 + 1);
}

static uint8_t written_at(uint64_t offset)
{
    return byte_at(offset) ^ 0xff;
}

static uint64_t ask(uint32_t opcode, uint64_t node, const void *body, size_t length, const void *data, size_t more)
{
    struct fuse_in_header header = {.opcode = opcode, .nodeid = node, .unique = next_unique};
    struct iovec vector[3] = {
        {&header, sizeof header}, {(void *)(uintptr_t)body, length}, {(void *)(uintptr_t)data, more}};
    header.len = (uint32_t)(sizeof header + length + more);
    next_unique += 2;
    REQUIRE(writev(device, vector, 3) == (ssize_t)header.len);
    return header.unique;
}

static uint64_t ask_read(uint64_t offset, uint32_t size)
{
    struct fuse_read_in in = {.offset = offset, .size = size};
    return ask(FUSE_READ, NODE, &in, sizeof in, NULL, 0);
}

static uint64_t ask_write(uint64_t offset)
{
    struct fuse_write_in in = {.offset = offset, .size = BLOCK};
    uint8_t data[BLOCK];
    for (uint32_t i = 0; i < BLOCK; i++) {
        data[i] = written_at(offset + i);
    }
    return ask(FUSE_WRITE, NODE, &in, sizeof in, data, sizeof data);
}

struct answer {
    struct fuse_out_header header;
    uint8_t data[2 * BLOCK];
};

static struct answer next_answer(void)
{
    struct answer answer;
    ssize_t got = recv(device, &answer, sizeof answer, 0);
    REQUIRE(got >= (ssize_t)sizeof answer.header && answer.header.len == (uint32_t)got);
    return answer;
}

static void require_bytes(const struct answer *answer, uint64_t offset, uint32_t size)
{
    REQUIRE(answer->header.error == 0 && answer->header.len == sizeof answer->header + size);
    for (uint32_t i = 0; i < size; i++) {
        REQUIRE(answer->data[i] == byte_at(offset + i));
    }
}

/* What `ls` asks goes to the session; its answer is the next that the kernel gets, whatever else waits. */
static void look_around(void)
{
    uint8_t message[4096];
    uint64_t unique = ask(FUSE_LOOKUP, 1, "name", 5, NULL, 0);
    ssize_t got = recv(session, message, sizeof message, 0);
    REQUIRE(got > (ssize_t)sizeof(struct fuse_in_header));
    struct fuse_in_header in;
    memcpy(&in, message, sizeof in);
    struct fuse_out_header out = {.len = sizeof out, .unique = in.unique};
    REQUIRE(send(session, &out, sizeof out, MSG_NOSIGNAL) == (ssize_t)sizeof out);
    struct answer answer = next_answer();
    REQUIRE(answer.header.unique == unique && answer.header.error == 0);
}

static void read_hot(void)
{
    uint64_t unique = ask_read(100, 2 * BLOCK);
    struct answer answer = next_answer();
    REQUIRE(answer.header.unique == unique);
    require_bytes(&answer, 100, 2 * BLOCK);
}

/* Requests of blocks behind HOT, one a block; the unique of a block is that of the first plus twice its number. */
static uint64_t ask_blocks(unsigned count, bool writing)
{
    uint64_t first = next_unique;
    for (unsigned i = 0; i < count; i++) {
        (void)(writing ? ask_write(HOT + i * BLOCK) : ask_read(HOT + i * BLOCK, BLOCK));
    }
    return first;
}

/* The next answers are those of `count` blocks, each once. A READ that succeeds brings its bytes. The number of those
 * that fail, which they do with EIO. */
static unsigned require_blocks(uint64_t first, unsigned count, bool *seen)
{
    unsigned failed = 0;
    for (unsigned i = 0; i < count; i++) {
        struct answer answer = next_answer();
        uint64_t block = (answer.header.unique - first) / 2;
        REQUIRE(block < BLOCKS && !seen[block]);
        REQUIRE(answer.header.error == 0 || answer.header.error == -EIO);
        failed += answer.header.error != 0;
        seen[block] = true;
        if (answer.header.len == sizeof answer.header + BLOCK) {
            require_bytes(&answer, HOT + block * BLOCK, BLOCK);
        }
    }
    return failed;
}

static void require_all(uint64_t first, unsigned count)
{
    bool seen[BLOCKS] = {false};
    REQUIRE(require_blocks(first, count, seen) == 0);
    for (unsigned i = 0; i < count; i++) {
        REQUIRE(seen[i]);
    }
}

/* ---- scenarios */

/* All reach the host before it answers any, and what does not need it is answered meanwhile. */
static void check_reads(void)
{
    uint64_t first = ask_blocks(16, false);
    wait_for_arrivals(16);
    look_around();
    if (!cannot_tell) {
        read_hot();
    }
    release();
    require_all(first, 16);
}

static void check_writes(void)
{
    uint8_t block[BLOCK];
    uint64_t first = ask_blocks(16, true);
    wait_for_arrivals(16);
    look_around();
    release();
    require_all(first, 16);
    for (uint64_t i = 0; i < 16; i++) {
        REQUIRE(pread(host, block, BLOCK, (off_t)(HOT + i * BLOCK)) == BLOCK);
        for (uint64_t j = 0; j < BLOCK; j++) {
            REQUIRE(block[j] == written_at(HOT + i * BLOCK + j));
        }
    }
}

/* More than there are buffers and workers. */
static void check_many(void)
{
    uint64_t first = ask_blocks(500, false);
    wait_for_arrivals(WORKERS + (cannot_tell ? THREADS - 1 : 0));
    look_around();
    release();
    require_all(first, 500);
}

static void *stop(void *argument)
{
    (void)argument;
    tapfs_fuse_stop(server);
    return NULL;
}

/* What is with the host is waited for, and what has not begun fails. */
static void check_stop(void)
{
    tapfs_fuse_statistics statistics;
    pthread_t stopper;
    unsigned sitting = cannot_tell ? THREADS - 1 : 0, begun = READ_BUFFERS + sitting, count = begun + 40;
    uint64_t first = ask_blocks(count, false);

    do {
        tapfs_fuse_counters(server, &statistics);
    } while (statistics.waited < count - sitting);
    wait_for_arrivals(WORKERS + sitting);
    look_around();
    REQUIRE(pthread_create(&stopper, NULL, stop, NULL) == 0);
    /* READs that have no buffer fail while the host still waits, and so does what the thread has not looked at. */
    bool seen[BLOCKS] = {false};
    REQUIRE(require_blocks(first, count - begun, seen) == count - begun);
    release();
    REQUIRE(require_blocks(first, begun, seen) <= begun - WORKERS - sitting);
    pthread_join(stopper, NULL);
}

/* The kernel has ended the connection: the answers have nobody to go to. */
static void check_gone(void)
{
    uint64_t ended;
    ask_blocks(16, false);
    wait_for_arrivals(16);
    close(device);
    device = -1;
    REQUIRE(read(tapfs_fuse_ended_fd(server), &ended, sizeof ended) < 0 || ended > 0);
    release();
    tapfs_fuse_stop(server);
}

/* ---- life */

static void forbid_io_uring(void)
{
    struct sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = sizeof rules / sizeof rules[0], .filter = rules};
    REQUIRE(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
    REQUIRE(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program) == 0);
}

static void make_file(const char *path)
{
    uint8_t block[BLOCK];
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    REQUIRE(file >= 0);
    for (uint64_t at = 0; at < SIZE; at += BLOCK) {
        for (uint64_t i = 0; i < BLOCK; i++) {
            block[i] = byte_at(at + i);
        }
        REQUIRE(write(file, block, BLOCK) == BLOCK);
    }
    host = file;
}

int main(int count, char **words)
{
    const struct {
        const char *name;
        void (*check)(void);
    } scenarios[] = {
        {"reads", check_reads}, {"writes", check_writes}, {"many", check_many}, {"stop", check_stop}, {"gone", check_gone}};
    tapfs_layer layer = {.virtual_size = SIZE, .identity = 1, .writable = 1};
    int devices[2], sessions[2], large = 4 << 20;
    size_t chosen = 0;

    REQUIRE(count >= 3);
    cannot_tell = count > 3 && strcmp(words[3], "t") == 0;
    while (strcmp(words[1], scenarios[chosen].name) != 0) {
        REQUIRE(++chosen < sizeof scenarios / sizeof scenarios[0]);
    }
    forbid_io_uring();
    make_file(words[2]);
    disk = tapfs_disk_new(1 << 20);
    REQUIRE(disk != NULL && tapfs_disk_add_layer(disk, &layer) == 0);
    REQUIRE(tapfs_disk_add_file(disk, 0, host, TAPFS_FILE_WRITABLE) == 0);
    REQUIRE(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, devices) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, sessions) == 0);
    for (int i = 0; i < 2; i++) {
        setsockopt(devices[i], SOL_SOCKET, SO_SNDBUF, &large, sizeof large);
    }
    device = devices[0];
    session = sessions[0];
    server = tapfs_fuse_new(devices[1], sessions[1], disk);
    REQUIRE(server != NULL && tapfs_fuse_add_node(server, NODE, 0, SIZE, 1, -1) == 0);
    REQUIRE(tapfs_fuse_start(server, THREADS) == 0);
    scenarios[chosen].check();
    tapfs_fuse_free(server);
    tapfs_disk_free(disk);
    close(device);
    close(session);
    close(host);
    puts("ok");
    return 0;
}
