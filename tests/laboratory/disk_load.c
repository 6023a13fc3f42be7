/* Load on a disk that notices every lost, torn, misplaced or revived write.  Linked statically: guests have no libraries.
 *
 * usage: disk-load write DEVICE WORKERS SECONDS SEED   random writes, reads and flushes; then all is read again
 *        disk-load read DEVICE WORKERS REQUESTS BYTES  random reads of BYTES; says how long they took
 *
 * All I/O is O_DIRECT.  Each worker is a process and owns every WORKERS-th chunk of the disk, so it knows what the disk
 * must hold there: every sector is filled with its own number, the seed and the generation of its last finished write.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <linux/fs.h>

enum { SECTOR = 512, BLOCK = 4096, CHUNK_BLOCKS = 16, MAX_CHUNKS = 1024 };

static volatile sig_atomic_t ended;
static unsigned char *buffer;
static uint64_t random_state;

static void end(int number) { (void)number; ended = 1; }

static uint64_t draw(uint64_t limit)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state % limit;
}

static void fail(const char *what, uint64_t offset)
{
    printf("LOAD-FAILED %s at byte %llu: %s\n", what, (unsigned long long)offset, strerror(errno));
    fflush(stdout);
    _exit(1);
}

static void fill(uint64_t block, uint64_t blocks, uint64_t seed, uint64_t generation)
{
    uint64_t *word = (uint64_t *)buffer;
    for (uint64_t sector = block * (BLOCK / SECTOR); sector < (block + blocks) * (BLOCK / SECTOR); sector++)
        for (unsigned i = 0; i < SECTOR / 8; i += 4, word += 4) {
            word[0] = sector; word[1] = seed; word[2] = generation; word[3] = ~sector ^ generation;
        }
}

/* What was read of one block against the generation it must have. */
static void compare(const unsigned char *data, uint64_t block, uint64_t seed, uint64_t generation)
{
    const uint64_t *word = (const uint64_t *)data;
    for (unsigned i = 0; i < BLOCK / 8; i += 4) {
        uint64_t sector = block * (BLOCK / SECTOR) + i * 8 / SECTOR;
        if (word[i] != sector || word[i + 1] != seed || word[i + 2] != generation) {
            printf("LOAD-FAILED sector %llu: expected generation %llu, found sector %llu seed %llu generation %llu\n",
                   (unsigned long long)sector, (unsigned long long)generation, (unsigned long long)word[i],
                   (unsigned long long)word[i + 1], (unsigned long long)word[i + 2]);
            fflush(stdout);
            _exit(1);
        }
    }
}

static uint64_t write_and_verify(int disk, uint64_t blocks, unsigned worker, unsigned workers, uint64_t seed)
{
    uint64_t chunks = blocks / CHUNK_BLOCKS < MAX_CHUNKS ? blocks / CHUNK_BLOCKS : MAX_CHUNKS;
    uint64_t *generations = calloc(chunks * CHUNK_BLOCKS, sizeof *generations), generation = 0, mine = chunks / workers;
    while (!ended) {
        uint64_t first = draw(CHUNK_BLOCKS), count = 1 + draw(CHUNK_BLOCKS - first);
        uint64_t block = (draw(mine) * workers + worker) * CHUNK_BLOCKS + first;
        ssize_t bytes = (ssize_t)(count * BLOCK);
        if (draw(4)) {
            generation++;
            fill(block, count, seed, generation);
            if (pwrite(disk, buffer, (size_t)bytes, (off_t)(block * BLOCK)) != bytes) fail("write", block * BLOCK);
            for (uint64_t i = 0; i < count; i++) generations[block + i] = generation;
            if (!draw(20) && fdatasync(disk)) fail("flush", 0);
        } else {
            if (pread(disk, buffer, (size_t)bytes, (off_t)(block * BLOCK)) != bytes) fail("read", block * BLOCK);
            for (uint64_t i = 0; i < count; i++)
                if (generations[block + i]) compare(buffer + i * BLOCK, block + i, seed, generations[block + i]);
        }
    }
    if (fdatasync(disk)) fail("last flush", 0);
    for (uint64_t block = 0; block < chunks * CHUNK_BLOCKS; block++) {
        if (!generations[block]) continue;
        if (pread(disk, buffer, BLOCK, (off_t)(block * BLOCK)) != BLOCK) fail("last read", block * BLOCK);
        compare(buffer, block, seed, generations[block]);
    }
    return generation;
}

static void read_only(int disk, uint64_t bytes_of_disk, uint64_t requests, uint64_t bytes)
{
    for (uint64_t i = 0; i < requests; i++) {
        uint64_t offset = draw(bytes_of_disk / bytes) * bytes;
        if (pread(disk, buffer, bytes, (off_t)offset) != (ssize_t)bytes) fail("read", offset);
    }
}

int main(int argc, char **argv)
{
    if (argc != 6) return 64;
    int writing = !strcmp(argv[1], "write"), failed = 0, status, counts[2];
    unsigned workers = (unsigned)atoi(argv[3]);
    uint64_t amount = strtoull(argv[4], NULL, 10), extra = strtoull(argv[5], NULL, 10), disk_bytes = 0, total = 0, count;
    struct timespec begin, now;
    int disk = open(argv[2], (writing ? O_RDWR : O_RDONLY) | O_DIRECT);
    if (disk < 0 || ioctl(disk, BLKGETSIZE64, &disk_bytes)) fail(argv[2], 0);
    if (posix_memalign((void **)&buffer, BLOCK, 1 << 20) || pipe(counts)) fail("memory", 0);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (unsigned worker = 0; worker < workers; worker++)
        if (!fork()) {
            random_state = 0x9e3779b97f4a7c15u * (worker + 1) + extra;
            signal(SIGALRM, end); /* restarts: no request is cut short */
            if (writing) alarm((unsigned)amount);
            count = amount / workers;
            if (writing) count = write_and_verify(disk, disk_bytes / BLOCK, worker, workers, extra);
            else read_only(disk, disk_bytes, count, extra);
            _exit(write(counts[1], &count, sizeof count) != sizeof count);
        }
    for (unsigned worker = 0; worker < workers; worker++)
        if (wait(&status) < 0 || status) failed = 1;
        else if (read(counts[0], &count, sizeof count) == sizeof count) total += count;
    clock_gettime(CLOCK_MONOTONIC, &now);
    printf("%s %llu requests %.3f s\n", failed ? "LOAD-FAILED" : "LOAD-OK", (unsigned long long)total,
           (double)(now.tv_sec - begin.tv_sec) + (double)(now.tv_nsec - begin.tv_nsec) / 1e9);
    return failed;
}
