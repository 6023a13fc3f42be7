/*
 * O_DIRECT on a host that is played here: linked with --wrap=pread,pwrite,fcntl,fstat,statx.
 * usage: direct_driver SCENARIO FOLDER; "ok" and 0, or a message and 1.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mover/mover.h"

#define REQUIRE(condition) ((condition) ? (void)0 : die(#condition, __LINE__))
#define SECTOR 512u
#define LARGE 16384u
#define SIZE (8u * LARGE + 3 * SECTOR)
#define THREADS 4u

/* ---- the host */

static atomic_bool direct;   /* O_DIRECT is on */
static uint32_t demanded;    /* what it demands then, of memory, offset and length; 0: it refuses every transfer */
static atomic_int to_refuse; /* transfers that wait for each other before they are refused */
static atomic_int refused;
static int grow_by, grow_times; /* how the file grows whenever somebody asks for its size */
static uint64_t most_read;      /* a transfer breaks off after so many bytes; 0: it does not */
static const tapfs_disk *locked; /* writes to its file hold their blocks */
static int fd;

static void die(const char *what, int line)
{
    fprintf(stderr, "line %d: %s (errno %d)\n", line, what, errno);
    exit(1);
}

ssize_t __real_pread(int descriptor, void *buffer, size_t length, off_t offset);
ssize_t __real_pwrite(int descriptor, const void *buffer, size_t length, off_t offset);
int __real_fstat(int descriptor, struct stat *status);
ssize_t __wrap_pread(int descriptor, void *buffer, size_t length, off_t offset);
ssize_t __wrap_pwrite(int descriptor, const void *buffer, size_t length, off_t offset);
int __wrap_fstat(int descriptor, struct stat *status);
int __wrap_fcntl(int descriptor, int command, ...);
int __wrap_statx(int folder, const char *path, int flags, unsigned mask, struct statx *status);

/* True: the host does not take this transfer. */
static bool refuses(const void *buffer, size_t length, off_t offset)
{
    if (!atomic_load(&direct)) {
        return false;
    }
    if (demanded == 0) {
        /* All that are on their way are refused before the first of them hears of it. */
        atomic_fetch_add(&refused, 1);
        while (atomic_load(&refused) < atomic_load(&to_refuse)) {
            usleep(100);
        }
        return true;
    }
    return ((uintptr_t)buffer | length | (size_t)offset) % demanded != 0;
}

ssize_t __wrap_pread(int descriptor, void *buffer, size_t length, off_t offset)
{
    if (refuses(buffer, length, offset)) {
        errno = EINVAL;
        return -1;
    }
    return __real_pread(descriptor, buffer, most_read != 0 && length > most_read ? most_read : length, offset);
}

ssize_t __wrap_pwrite(int descriptor, const void *buffer, size_t length, off_t offset)
{
    if (locked != NULL) {
        const struct range_holder *holder = locked->ranges.first;
        uint64_t block = demanded;
        REQUIRE(holder != NULL && holder->exclusive && holder->next == NULL);
        REQUIRE(holder->start % block == 0 && holder->start <= (uint64_t)offset);
        REQUIRE(holder->end % block == 0 && holder->end >= (uint64_t)offset + length);
    }
    if (refuses(buffer, length, offset)) {
        errno = EINVAL;
        return -1;
    }
    return __real_pwrite(descriptor, buffer, length, offset);
}

int __wrap_fstat(int descriptor, struct stat *status)
{
    static const uint8_t more[SECTOR] = {0xee};
    if (grow_times > 0) {
        grow_times--;
        off_t end = lseek(descriptor, 0, SEEK_END);
        REQUIRE(__real_pwrite(descriptor, more, (size_t)grow_by, end) == grow_by);
    }
    return __real_fstat(descriptor, status);
}

int __wrap_fcntl(int descriptor, int command, ...)
{
    va_list arguments;
    (void)descriptor;
    va_start(arguments, command);
    int value = command == F_SETFL ? va_arg(arguments, int) : 0;
    va_end(arguments);
    REQUIRE(command == F_GETFL || command == F_SETFL);
    if (command == F_SETFL) {
        atomic_store(&direct, (value & O_DIRECT) != 0);
    }
    return O_RDWR | (atomic_load(&direct) ? O_DIRECT : 0);
}

int __wrap_statx(int folder, const char *path, int flags, unsigned mask, struct statx *status)
{
    (void)folder, (void)path, (void)flags;
    *status = (struct statx){.stx_mask = mask, .stx_dio_mem_align = demanded, .stx_dio_offset_align = demanded};
    return 0;
}

/* ---- a disk of one file */

static tapfs_disk *disk_of(const char *folder, uint64_t size)
{
    char path[4096];
    tapfs_layer layer = {.virtual_size = size, .identity = 1, .writable = 1};
    snprintf(path, sizeof path, "%s/file", folder);
    fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    REQUIRE(fd >= 0);
    tapfs_disk *disk = tapfs_disk_new(1 << 20);
    REQUIRE(tapfs_disk_add_layer(disk, &layer) == 0);
    REQUIRE(tapfs_disk_add_file(disk, 0, fd, TAPFS_FILE_DIRECT | TAPFS_FILE_WRITABLE) == 0);
    atomic_store(&direct, true);
    return disk;
}

static void free_disk(tapfs_disk *disk)
{
    tapfs_disk_free(disk);
    close(fd);
}

static void fill(uint8_t *bytes, size_t length, unsigned seed)
{
    for (size_t i = 0; i < length; i++) {
        bytes[i] = (uint8_t)((seed * 31 + i * 7 + i / 251) % 255 + 1);
    }
}

/* ---- scenarios */

/* Between a read that met the end of the file and the look at its size the file grows. */
static void check_grows(const char *folder)
{
    static uint8_t buffer[4 * DIRECT_ALIGNMENT], bytes[4 * DIRECT_ALIGNMENT];
    demanded = SECTOR;
    fill(bytes, sizeof bytes, 1);
    for (uint64_t at = 0; at < DIRECT_ALIGNMENT; at += SECTOR) {
        for (int times = 1; times <= 12; times++) {
            uint64_t length = DIRECT_ALIGNMENT + at + SECTOR, got = 0;
            tapfs_disk *disk = disk_of(folder, sizeof bytes);
            struct host_file *file = disk->layers[0]->files[0];
            REQUIRE(__real_pwrite(fd, bytes, length, 0) == (ssize_t)length);
            grow_by = SECTOR;
            grow_times = times;
            memset(buffer, 0xdd, sizeof buffer);
            REQUIRE(host_read(file, buffer, 0, sizeof buffer, false, &got) == 0);
            /* All that was there when it began, and nothing that was not there when it ended. */
            REQUIRE(got >= length && got <= (uint64_t)lseek(fd, 0, SEEK_END));
            REQUIRE(memcmp(buffer, bytes, length) == 0);
            REQUIRE(atomic_load(&file->direct));
            grow_times = 0;
            /* A neighbour's write makes the file longer while the rest of its block is read. */
            grow_times = times;
            REQUIRE(host_write(file, bytes, length - SECTOR + 1, 10) == 0);
            grow_times = 0;
            free_disk(disk);
        }
    }
}

/* A transfer that breaks off goes on, as long as it comes further. */
static void check_broken_off(const char *folder)
{
    static uint8_t buffer[4 * DIRECT_ALIGNMENT], bytes[4 * DIRECT_ALIGNMENT];
    uint64_t got = 0;
    demanded = SECTOR;
    fill(bytes, sizeof bytes, 2);
    tapfs_disk *disk = disk_of(folder, sizeof bytes);
    struct host_file *file = disk->layers[0]->files[0];
    REQUIRE(__real_pwrite(fd, bytes, sizeof bytes, 0) == (ssize_t)sizeof bytes);
    most_read = DIRECT_ALIGNMENT + SECTOR;
    REQUIRE(host_read(file, buffer, 0, sizeof buffer, false, &got) == 0);
    REQUIRE(got == sizeof buffer && memcmp(buffer, bytes, sizeof bytes) == 0);
    most_read = SECTOR;
    REQUIRE(host_read(file, buffer, 0, sizeof buffer, false, &got) == EIO);
    most_read = 0;
    free_disk(disk);
}

struct job {
    tapfs_disk *disk;
    uint32_t index;
    bool writing;
    tapfs_outcome outcome;
};

static void *transfer(void *argument)
{
    struct job *job = argument;
    static _Thread_local uint8_t buffer[DIRECT_ALIGNMENT] __attribute__((aligned(DIRECT_ALIGNMENT)));
    uint64_t offset = (uint64_t)job->index * DIRECT_ALIGNMENT;
    memset(buffer, (int)job->index + 1, sizeof buffer);
    if (job->writing) {
        tapfs_write(job->disk, buffer, offset, sizeof buffer, 0, &job->outcome);
    } else {
        tapfs_read(job->disk, buffer, offset, sizeof buffer, 0, &job->outcome);
    }
    return NULL;
}

/* A host that takes O_DIRECT in open(2) and refuses all transfers: several requests hear of it at once. */
static void check_refused(const char *folder)
{
    demanded = 0;
    for (int writing = 0; writing < 2; writing++) {
        struct job jobs[THREADS];
        pthread_t threads[THREADS];
        tapfs_disk *disk = disk_of(folder, THREADS * DIRECT_ALIGNMENT);
        REQUIRE(ftruncate(fd, THREADS * DIRECT_ALIGNMENT) == 0);
        atomic_store(&refused, 0);
        atomic_store(&to_refuse, THREADS);
        for (uint32_t i = 0; i < THREADS; i++) {
            jobs[i] = (struct job){.disk = disk, .index = i, .writing = writing != 0};
            REQUIRE(pthread_create(&threads[i], NULL, transfer, &jobs[i]) == 0);
        }
        for (uint32_t i = 0; i < THREADS; i++) {
            pthread_join(threads[i], NULL);
            REQUIRE(jobs[i].outcome.status == TAPFS_DONE && jobs[i].outcome.done == DIRECT_ALIGNMENT);
        }
        REQUIRE(!atomic_load(&disk->layers[0]->files[0]->direct) && !atomic_load(&direct));
        free_disk(disk);
    }
}

/* The same for a mover, whose workers finish what the host refuses. */
static void check_moves(const char *folder)
{
    static uint8_t memory[THREADS][DIRECT_ALIGNMENT] __attribute__((aligned(DIRECT_ALIGNMENT)));
    demanded = 0;
    for (int writing = 0; writing < 2; writing++) {
        struct move moves[THREADS];
        struct iovec parts[THREADS];
        tapfs_disk *disk = disk_of(folder, THREADS * DIRECT_ALIGNMENT);
        struct mover *mover = mover_new(disk, 2 * THREADS, THREADS, RING_NONE);
        uint32_t ended = 0;
        REQUIRE(mover != NULL && ftruncate(fd, THREADS * DIRECT_ALIGNMENT) == 0);
        atomic_store(&refused, 0);
        atomic_store(&to_refuse, THREADS);
        for (uint32_t i = 0; i < THREADS; i++) {
            parts[i] = (struct iovec){.iov_base = memory[i], .iov_len = DIRECT_ALIGNMENT};
            moves[i] = (struct move){.offset = (uint64_t)i * DIRECT_ALIGNMENT, .length = DIRECT_ALIGNMENT,
                                     .parts = &parts[i], .part_count = 1, .writing = writing != 0};
            REQUIRE(!mover_begin(mover, &moves[i]));
        }
        mover_submit(mover);
        while (ended < THREADS) {
            struct pollfd ready = {.fd = mover_fd(mover), .events = POLLIN};
            REQUIRE(poll(&ready, 1, 60000) == 1);
            for (const struct move *move = mover_ended(mover); move != NULL; move = move->next) {
                REQUIRE(move->outcome.status == TAPFS_DONE && move->outcome.done == DIRECT_ALIGNMENT);
                ended++;
            }
        }
        mover_free(mover);
        free_disk(disk);
    }
}

/* A host whose blocks are larger than a page: never refused, and a write holds the whole block. */
static void check_blocks(const char *folder)
{
    static uint8_t model[SIZE], buffer[SIZE];
    unsigned seed = 3;
    tapfs_outcome outcome;

    demanded = LARGE;
    tapfs_disk *disk = disk_of(folder, SIZE);
    fill(model, sizeof model, 4);
    REQUIRE(__real_pwrite(fd, model, SIZE, 0) == SIZE);
    locked = disk;
    for (int turn = 0; turn < 400; turn++) {
        uint64_t step = turn % 3 == 0 ? 1 : SECTOR;
        uint64_t offset = (uint64_t)rand_r(&seed) % (SIZE / step) * step;
        uint64_t length = minimum((1 + (uint64_t)rand_r(&seed) % (turn % 5 == 0 ? SIZE : 5000)) * step, SIZE - offset);
        if (turn % 2 == 0) {
            fill(model + offset, length, (unsigned)turn);
            tapfs_write(disk, model + offset, offset, length, 0, &outcome);
        } else {
            tapfs_read(disk, buffer, offset, length, 0, &outcome);
            REQUIRE(memcmp(buffer, model + offset, length) == 0);
        }
        REQUIRE(outcome.status == TAPFS_DONE && outcome.done == length);
        REQUIRE(lseek(fd, 0, SEEK_END) == SIZE);
    }
    locked = NULL;
    REQUIRE(atomic_load(&disk->layers[0]->files[0]->direct) && atomic_load(&direct));
    free_disk(disk);
}

int main(int count, char **arguments)
{
    const struct {
        const char *name;
        void (*check)(const char *folder);
    } scenarios[] = {
        {"grows", check_grows}, {"broken-off", check_broken_off}, {"refused", check_refused},
        {"moves", check_moves}, {"blocks", check_blocks},
    };

    REQUIRE(count == 3);
    for (size_t i = 0; i < sizeof scenarios / sizeof scenarios[0]; i++) {
        if (strcmp(arguments[1], scenarios[i].name) == 0) {
            scenarios[i].check(arguments[2]);
            puts("ok");
            return 0;
        }
    }
    return 1;
}
