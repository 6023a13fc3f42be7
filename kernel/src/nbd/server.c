/* The server: its threads and its clients, from start to stop. */
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "nbd/internal.h"

tapfs_nbd *tapfs_nbd_new(tapfs_disk *disk, uint64_t size, uint32_t access)
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
    server->access = access;
    pthread_mutex_init(&server->lock, NULL);
    pthread_cond_init(&server->settled, NULL);
    park_init(&server->park);
    rate_limit_init(&server->limit);
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

int tapfs_nbd_waits(tapfs_nbd *server)
{
    return atomic_load(&server->waits);
}

/* ---- pauses */

static void wake(tapfs_nbd *server)
{
    for (uint32_t i = 0; i < server->loop_count; i++) {
        nbd_loop_wake(&server->loops[i]);
    }
}

/* Under the lock. */
static bool all_settled(const tapfs_nbd *server)
{
    for (uint32_t i = 0; i < server->loop_count; i++) {
        const struct nbd_loop *loop = &server->loops[i];
        if (!loop->quiet || loop->generation != atomic_load(&server->generation)) {
            return false;
        }
    }
    return true;
}

static void await_settled(tapfs_nbd *server)
{
    wake(server);
    while (!all_settled(server)) {
        pthread_cond_wait(&server->settled, &server->lock);
    }
}

void tapfs_nbd_pause(tapfs_nbd *server)
{
    pthread_mutex_lock(&server->lock);
    atomic_store(&server->paused, true);
    await_settled(server);
    pthread_mutex_unlock(&server->lock);
}

void tapfs_nbd_set_disk(tapfs_nbd *server, tapfs_disk *disk, uint64_t size, uint32_t access)
{
    pthread_mutex_lock(&server->lock);
    server->disk = disk;
    server->size = size;
    server->access = access;
    atomic_store(&server->waits, false);
    atomic_fetch_add(&server->generation, 1);
    /* The old disk may be closed as soon as this returns. */
    await_settled(server);
    pthread_mutex_unlock(&server->lock);
}

void tapfs_nbd_unpause(tapfs_nbd *server)
{
    pthread_mutex_lock(&server->lock);
    for (uint32_t i = 0; i < server->loop_count; i++) {
        server->loops[i].quiet = false;
    }
    atomic_store(&server->paused, false);
    pthread_mutex_unlock(&server->lock);
    wake(server);
}

void tapfs_nbd_limit(tapfs_nbd *server, uint64_t bytes_per_second, uint64_t requests_per_second)
{
    rate_limit_set(&server->limit, bytes_per_second, requests_per_second);
    wake(server);
}

void tapfs_nbd_stop(tapfs_nbd *server)
{
    if (server->stopped) {
        return;
    }
    server->stopped = true;
    tapfs_nbd_unpause(server);
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
    rate_limit_destroy(&server->limit);
    pthread_cond_destroy(&server->settled);
    pthread_mutex_destroy(&server->lock);
    close(server->ended_fd);
    free(server);
}

const tapfs_metrics *tapfs_nbd_metrics(const tapfs_nbd *server)
{
    return &server->metrics;
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
