/*
 * The host's part of a benchmark's requests: this program reads and writes a file in the order of vhost_frontend.c, one call of the
 * host for each request, straight to pages that another process could share. There is no ring, no guest and no wakeup.
 *
 * usage: plain_calls FILE PATTERN BYTES DEPTH SECONDS DISK_BYTES PID
 */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "workload.h"

#define SEGMENTS_MAX 64u

int main(int count, char **arguments)
{
    struct workload work;
    struct iovec parts[SEGMENTS_MAX];
    uint32_t turn = 0;

    REQUIRE(count == 8);
    workload_read(&work, arguments + 2);
    REQUIRE(work.request_blocks <= SEGMENTS_MAX);
    work.backend = getpid();
    uint32_t pages = work.depth * work.request_blocks, step = pages % 37 != 0 ? 37 : 41;
    size_t room = (size_t)pages * BLOCK;
    uint8_t *memory = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    int file = open(arguments[1], O_RDWR | O_CLOEXEC);
    REQUIRE(memory != MAP_FAILED && file >= 0);
    do {
        uint64_t block = workload_next(&work);
        for (uint32_t i = 0; i < work.request_blocks; i++) {
            /* Never two neighbours together, as the guest's. */
            uint32_t page = (uint32_t)(((uint64_t)(turn * work.request_blocks + i) * step) % pages);
            parts[i] = (struct iovec){memory + (size_t)page * BLOCK, BLOCK};
            if (work.writing) {
                stamp(parts[i].iov_base, block + i);
            }
        }
        turn = (turn + 1) % work.depth;
        off_t offset = (off_t)(block * BLOCK);
        ssize_t length = (ssize_t)work.request_blocks * BLOCK;
        int parts_count = (int)work.request_blocks;
        REQUIRE((work.writing ? pwritev(file, parts, parts_count, offset) : preadv(file, parts, parts_count, offset)) ==
                length);
    } while (workload_goes_on(&work, 1));
    return 0;
}
