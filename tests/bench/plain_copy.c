/*
 * The host's part of a conversion to raw: this program copies the pieces of an image that a map lists, by pread, a look for zeros and pwrite.
 * It reads no tables and decides nothing, so no converter with the same calls takes less.
 *
 * usage: plain_copy PIECES IMAGE TARGET DISK_BYTES
 * PIECES has a line for each piece: its place on the disk, its place in the image, its length.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BLOCK 4096u
#define WINDOW (4u << 20)

static unsigned char window[WINDOW];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static bool is_zero(const unsigned char *bytes, size_t length)
{
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, length - 1) == 0;
}

static void put(int target, const unsigned char *bytes, size_t length, uint64_t place)
{
    if (length != 0 && pwrite(target, bytes, length, (off_t)place) != (ssize_t)length)
        fail("pwrite");
}

static void copy(int source, int target, uint64_t disk, uint64_t host, size_t length)
{
    size_t start = 0, at = 0;

    if (pread(source, window, length, (off_t)host) != (ssize_t)length)
        fail("pread");
    for (; at < length; at += BLOCK) {
        size_t block = length - at < BLOCK ? length - at : BLOCK;
        if (is_zero(window + at, block)) {
            put(target, window + start, at - start, disk + start);
            start = at + block;
        }
    }
    if (start < length)
        put(target, window + start, length - start, disk + start);
}

int main(int count, char **arguments)
{
    uint64_t disk, host, length;

    if (count != 5) {
        fprintf(stderr, "usage: plain_copy PIECES IMAGE TARGET DISK_BYTES\n");
        return 2;
    }
    FILE *pieces = fopen(arguments[1], "r");
    int source = open(arguments[2], O_RDONLY | O_CLOEXEC);
    int target = open(arguments[3], O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (pieces == NULL || source < 0 || target < 0)
        fail("open");
    if (ftruncate(target, (off_t)strtoull(arguments[4], NULL, 10)) != 0)
        fail("ftruncate");
    while (fscanf(pieces, "%lu %lu %lu", &disk, &host, &length) == 3)
        while (length != 0) {
            size_t part = length < WINDOW ? length : WINDOW;
            copy(source, target, disk, host, part);
            disk += part;
            host += part;
            length -= part;
        }
    if (fdatasync(target) != 0)
        fail("fdatasync");
    return 0;
}
