/*
 * The host's part of a conversion to raw: this program copies the pieces of an image that a map lists, by pread, a look for zeros and pwrite.
 * It reads no tables and decides nothing. Two threads do it, of which one writes at a time, as the host lets no more write to a file; one
 * that waits for that in the kernel would spin. So no converter with the same calls takes less, neither of the clock nor of processor time.
 *
 * usage: plain_copy PIECES IMAGE TARGET DISK_BYTES
 * PIECES has a line for each piece: its place on the disk, its place in the image, its length.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK 4096u
#define WINDOW (2u << 20)
#define THREADS 2

struct part {
    uint64_t disk, host; /* of a run of data: its place in the window */
    size_t length;
};

static int source, target;
static FILE *pieces;
static struct part rest; /* of the piece that was read last */
static pthread_mutex_t listing = PTHREAD_MUTEX_INITIALIZER, writing = PTHREAD_MUTEX_INITIALIZER;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static bool is_zero(const unsigned char *bytes, size_t length)
{
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0;
}

static void put(const unsigned char *bytes, size_t length, uint64_t place)
{
    if (pwrite(target, bytes, length, (off_t)place) != (ssize_t)length)
        fail("pwrite");
}

static bool next_part(struct part *part)
{
    bool found = true;

    pthread_mutex_lock(&listing);
    if (rest.length == 0)
        found = fscanf(pieces, "%lu %lu %lu", &rest.disk, &rest.host, &rest.length) == 3;
    if (found) {
        *part = rest;
        part->length = rest.length < WINDOW ? rest.length : WINDOW;
        rest.disk += part->length;
        rest.host += part->length;
        rest.length -= part->length;
    }
    pthread_mutex_unlock(&listing);
    return found;
}

/* The runs of blocks that are not all zeros; their number. */
static size_t find_data(const unsigned char *window, const struct part *part, struct part *runs)
{
    size_t start = 0, count = 0;

    for (size_t at = 0; at < part->length; at += BLOCK) {
        size_t block = part->length - at < BLOCK ? part->length - at : BLOCK;
        if (is_zero(window + at, block)) {
            if (at > start)
                runs[count++] = (struct part){part->disk + start, start, at - start};
            start = at + block;
        }
    }
    if (start < part->length)
        runs[count++] = (struct part){part->disk + start, start, part->length - start};
    return count;
}

static void *copy(void *unused)
{
    unsigned char *window = malloc(WINDOW);
    struct part part, runs[WINDOW / BLOCK];

    if (window == NULL)
        fail("memory");
    while (next_part(&part)) {
        if (pread(source, window, part.length, (off_t)part.host) != (ssize_t)part.length)
            fail("pread");
        size_t count = find_data(window, &part, runs);
        pthread_mutex_lock(&writing);
        for (size_t i = 0; i < count; i++)
            put(window + runs[i].host, runs[i].length, runs[i].disk);
        pthread_mutex_unlock(&writing);
    }
    free(window);
    return unused;
}

int main(int count, char **arguments)
{
    pthread_t threads[THREADS];

    if (count != 5) {
        fprintf(stderr, "usage: plain_copy PIECES IMAGE TARGET DISK_BYTES\n");
        return 2;
    }
    pieces = fopen(arguments[1], "r");
    source = open(arguments[2], O_RDONLY | O_CLOEXEC);
    target = open(arguments[3], O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (pieces == NULL || source < 0 || target < 0)
        fail("open");
    if (ftruncate(target, (off_t)strtoull(arguments[4], NULL, 10)) != 0)
        fail("ftruncate");
    for (int i = 0; i < THREADS; i++)
        if ((errno = pthread_create(&threads[i], NULL, copy, NULL)) != 0)
            fail("thread");
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    if (fdatasync(target) != 0)
        fail("fdatasync");
    return 0;
}
