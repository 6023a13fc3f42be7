/*
 * Streams of hostile NBD clients after the negotiation: whatever one sends, its connection ends, the server holds no
 * memory for it, and goes on. An input is the style of replies, the contexts, and the stream.
 */
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "fuzz.h"
#include "nbd/nbd.h"
#include "owners.h"

static tapfs_nbd *server;
static struct owners owners;

static size_t next(void *device, uint32_t queue, tapfs_parked *parked)
{
    return tapfs_nbd_next_parked(device, queue, parked, 1);
}

static int resume(void *device, uint64_t ticket, tapfs_parked *parked)
{
    return tapfs_nbd_resume_parked(device, ticket, parked);
}

static bool moves(const tapfs_parked *parked)
{
    return parked->request == TAPFS_NBD_READ || parked->request == TAPFS_NBD_WRITE;
}

static void complete(void *device, const tapfs_parked *parked)
{
    HOLD(parked->offset <= SIZE && parked->length <= SIZE - parked->offset);
    if (parked->request == TAPFS_NBD_STATUS) {
        int single;
        uint32_t wanted = tapfs_nbd_wanted(device, parked->ticket, &single);
        for (uint32_t i = 0; i < 32; i++) {
            const tapfs_nbd_state states[2] = {{parked->length / 2, i}, {parked->length - parked->length / 2, 1}};
            if (wanted >> i & 1) {
                tapfs_nbd_add_states(device, parked->ticket, i, states, single ? 1 : 2);
            }
        }
    }
    tapfs_nbd_complete(device, parked->ticket, parked->request == TAPFS_NBD_FAST_ZERO ? EOPNOTSUPP : 0);
}

int LLVMFuzzerInitialize(int *count, char ***words)
{
    static const struct front front = {next, resume, complete, moves};
    char path[64];

    (void)count;
    (void)words;
    snprintf(path, sizeof path, "/proc/self/fd/%d", memfd_create("image", 0));
    owned_disk_open(path);
    server = tapfs_nbd_new(disk, SIZE, TAPFS_NBD_WRITABLE);
    HOLD(server != NULL && tapfs_nbd_start(server, 1) == 0);
    owners_start(&owners, &front, server);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct input input = {data, size};
    static uint8_t answers[1 << 16];
    tapfs_nbd_statistics counted;
    int pair[2];

    uint32_t style = take_byte(&input) % 3, contexts = take_byte(&input) % 8;
    HOLD(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    HOLD(fcntl(pair[1], F_SETFL, O_NONBLOCK) == 0 && tapfs_nbd_add(server, pair[1], style, contexts) == 0);
    while (input.left > 0) {
        ssize_t sent = send(pair[0], input.at, input.left, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent > 0) {
            input.at += sent;
            input.left -= (size_t)sent;
        } else if (errno != EAGAIN || recv(pair[0], answers, sizeof answers, 0) <= 0) {
            break; /* the server has ended it */
        }
    }
    shutdown(pair[0], SHUT_WR);
    while (recv(pair[0], answers, sizeof answers, 0) > 0) {
    }
    close(pair[0]);
    do {
        tapfs_nbd_counters(server, &counted);
    } while (counted.connections > 0);
    HOLD(counted.held == 0);
    forget_map(disk, size % 8 * UNIT, UNIT);
    return 0;
}
