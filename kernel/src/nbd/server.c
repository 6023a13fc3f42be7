/* The server: its threads and its clients, from start to stop. */
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "nbd/internal.h"

tapfs_nbd *tapfs_nbd_new(tapfs_disk *disk, uint64_t size, int writable)
{
    tapfs_nbd *server = calloc(1, sizeof *server);
    if (server == NULL) {
        return NULL;
    }
    server->ended_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (server->ended_fd < 0) {
        free(server);
        return NULL;
    }
    server->disk = disk;
    server->size = size;
    server->writable = writable != 0;
    park_init(&server->park);
    return server;
}

int tapfs_nbd_start(tapfs_nbd *server, uint32_t threads)
{
    if (threads == 0 || threads > LOOPS_MAX || server->loop_count != 0) {
        return -EINVAL;
    }
    for (uint32_t i = 0; i < threads; i++) {
        int error = nbd_loop_start(&server->loops[i], server);
        if (error != 0) {
            return -error;
        }
        server->loop_count++;
    }
    return 0;
}

/* The thread that has the fewest connections, and one more from now on. */
static struct nbd_loop *least_loaded(tapfs_nbd *server)
{
    struct nbd_loop *least = &server->loops[0];
    for (uint32_t i = 1; i < server->loop_count; i++) {
        if (atomic_load(&server->loops[i].load) < atomic_load(&least->load)) {
            least = &server->loops[i];
        }
    }
    atomic_fetch_add(&least->load, 1);
    return least;
}

int tapfs_nbd_add(tapfs_nbd *server, int fd, uint32_t style, uint32_t contexts)
{
    if (style > TAPFS_NBD_EXTENDED || server->loop_count == 0) {
        return -EINVAL;
    }
    struct nbd_loop *loop = least_loaded(server);
    struct nbd_connection *connection = nbd_connection_new(loop, fd, style, contexts);
    int error = connection == NULL ? ENOMEM : 0;
    if (error == 0) {
        atomic_fetch_add(&server->connections, 1);
        if (!nbd_loop_add(loop, connection)) {
            atomic_fetch_sub(&server->connections, 1);
            free(connection);
            error = ESHUTDOWN;
        }
    }
    if (error != 0) {
        atomic_fetch_sub(&loop->load, 1);
    }
    return -error;
}

int tapfs_nbd_ended_fd(tapfs_nbd *server)
{
    return server->ended_fd;
}

void tapfs_nbd_stop(tapfs_nbd *server)
{
    if (server->stopped) {
        return;
    }
    server->stopped = true;
    atomic_store(&server->stopping, true);
    for (uint32_t i = 0; i < server->loop_count; i++) {
        nbd_loop_stop(&server->loops[i]);
    }
    nbd_park_stop(server);
    for (uint32_t i = 0; i < server->loop_count; i++) {
        nbd_loop_join(&server->loops[i]);
    }
}

void tapfs_nbd_free(tapfs_nbd *server)
{
    tapfs_nbd_stop(server);
    for (uint32_t i = 0; i < server->loop_count; i++) {
        nbd_loop_free(&server->loops[i]);
    }
    park_destroy(&server->park);
    close(server->ended_fd);
    free(server);
}

void tapfs_nbd_counters(tapfs_nbd *server, tapfs_nbd_statistics *statistics)
{
    statistics->reads = atomic_load(&server->reads);
    statistics->writes = atomic_load(&server->writes);
    statistics->parked = atomic_load(&server->parked);
    statistics->waited = atomic_load(&server->waited);
    statistics->connections = atomic_load(&server->connections);
    statistics->held = atomic_load(&server->held);
}
