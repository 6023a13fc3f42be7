/*
 * TLS for clients of the NBD server, by OpenSSL: a thread for each such client stands between its socket and a socket
 * pair, whose other end is served like any client's.
 *
 * The thread waits for whichever of the two sockets it needs next, and holds a bounded piece of either direction. When
 * the plain side ends it says so to the client in TLS, and ends. When the client ends, the plain side is told, and
 * answers that are still to come are sent.
 */
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "nbd/internal.h"

#define BUFFER_BYTES (64u << 10)
#define KEYS_MAX 1024u
#define IDENTITY_MAX 256u
#define STACK_BYTES (256u << 10)
/* Clients have so many seconds to take their last answers. */
#define END_SECONDS 2

struct shared_key {
    char identity[IDENTITY_MAX];
    uint8_t bytes[TAPFS_TLS_KEY_MAX];
    uint32_t length;
};

struct tapfs_tls {
    SSL_CTX *context;
    struct shared_key *keys;
    size_t key_count;
    pthread_mutex_t lock; /* of the rest */
    pthread_cond_t ended;
    struct pump *pumps;
    char why[256];
};

/* Bytes on their way in one direction. */
struct flow {
    uint8_t bytes[BUFFER_BYTES];
    size_t start, end;
    bool over; /* no more will come */
};

struct pump {
    struct pump *next, *previous;
    tapfs_tls *tls;
    SSL *ssl;
    int network, plain;
    short network_waits, plain_waits; /* what poll is to wait for */
    struct flow in, out;
    bool told; /* the plain side knows that the client has ended */
};

/* ---- one client, in its thread */

static void note_failure(tapfs_tls *tls)
{
    char text[sizeof tls->why];
    unsigned long error = ERR_peek_last_error();

    if (error == 0) {
        return;
    }
    ERR_error_string_n(error, text, sizeof text);
    ERR_clear_error();
    pthread_mutex_lock(&tls->lock);
    memcpy(tls->why, text, sizeof text);
    pthread_mutex_unlock(&tls->lock);
}

/* What became of a call of OpenSSL: bytes were moved, it waits, or its side is over. */
enum moved { MOVED, WAITS, OVER };

static enum moved judge(struct pump *pump, int result)
{
    switch (SSL_get_error(pump->ssl, result)) {
    case SSL_ERROR_NONE:
        return MOVED;
    case SSL_ERROR_WANT_READ:
        pump->network_waits |= POLLIN;
        return WAITS;
    case SSL_ERROR_WANT_WRITE:
        pump->network_waits |= POLLOUT;
        return WAITS;
    default:
        note_failure(pump->tls);
        return OVER;
    }
}

static bool is_empty(const struct flow *flow)
{
    return flow->start == flow->end;
}

static bool decrypt(struct pump *pump)
{
    struct flow *in = &pump->in;
    size_t got = 0;

    if (!is_empty(in) || in->over) {
        return false;
    }
    enum moved moved = judge(pump, SSL_read_ex(pump->ssl, in->bytes, sizeof in->bytes, &got));
    in->start = 0;
    in->end = moved == MOVED ? got : 0;
    in->over = moved == OVER;
    return moved != WAITS;
}

/* False with `over` set in the other direction: nobody reads the plain side. */
static bool pass_in(struct pump *pump)
{
    struct flow *in = &pump->in;

    if (is_empty(in)) {
        if (in->over && !pump->told) {
            pump->told = true;
            shutdown(pump->plain, SHUT_WR);
        }
        return false;
    }
    ssize_t sent = send(pump->plain, in->bytes + in->start, in->end - in->start, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0) {
        in->start += (size_t)sent;
        return true;
    }
    if (errno == EAGAIN || errno == EINTR) {
        pump->plain_waits |= POLLOUT;
        return false;
    }
    in->start = in->end;
    in->over = true;
    return false;
}

static bool take_out(struct pump *pump)
{
    struct flow *out = &pump->out;

    if (!is_empty(out) || out->over) {
        return false;
    }
    ssize_t got = recv(pump->plain, out->bytes, sizeof out->bytes, MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
        pump->plain_waits |= POLLIN;
        return false;
    }
    out->start = 0;
    out->end = got > 0 ? (size_t)got : 0;
    out->over = got <= 0;
    return true;
}

static bool encrypt(struct pump *pump)
{
    struct flow *out = &pump->out;
    size_t taken = 0;

    if (is_empty(out)) {
        return false;
    }
    enum moved moved = judge(pump, SSL_write_ex(pump->ssl, out->bytes + out->start, out->end - out->start, &taken));
    out->start += moved == MOVED ? taken : 0;
    if (moved == OVER) {
        out->start = out->end;
        out->over = true;
    }
    return moved != WAITS;
}

static void *run(void *argument)
{
    struct pump *pump = argument;
    tapfs_tls *tls = pump->tls;
    struct pollfd waits[2] = {{.fd = pump->network}, {.fd = pump->plain}};

    while (!pump->out.over || !is_empty(&pump->out)) {
        pump->network_waits = pump->plain_waits = 0;
        bool moved = decrypt(pump);
        moved |= pass_in(pump);
        moved |= take_out(pump);
        moved |= encrypt(pump);
        if (!moved) {
            waits[0].events = pump->network_waits;
            waits[1].events = pump->plain_waits;
            /* A side that nothing is wanted of is not looked at: its end would be reported again and again. */
            waits[0].fd = pump->network_waits != 0 ? pump->network : -1;
            waits[1].fd = pump->plain_waits != 0 ? pump->plain : -1;
            poll(waits, 2, -1);
        }
    }
    SSL_shutdown(pump->ssl);
    SSL_free(pump->ssl);
    ERR_clear_error();

    pthread_mutex_lock(&tls->lock);
    *(pump->previous != NULL ? &pump->previous->next : &tls->pumps) = pump->next;
    if (pump->next != NULL) {
        pump->next->previous = pump->previous;
    }
    close(pump->network);
    close(pump->plain);
    free(pump);
    pthread_cond_broadcast(&tls->ended);
    pthread_mutex_unlock(&tls->lock);
    return NULL;
}

/* ---- in any thread */

static int start_thread(struct pump *pump)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t broken_pipe, before;

    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    /* OpenSSL writes without MSG_NOSIGNAL. The thread inherits what is blocked. */
    sigemptyset(&broken_pipe);
    sigaddset(&broken_pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &broken_pipe, &before);
    int error = pthread_create(&thread, &attributes, run, pump);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

static int begin(struct pump *pump)
{
    tapfs_tls *tls = pump->tls;

    pump->ssl = SSL_new(tls->context);
    if (pump->ssl == NULL || SSL_set_fd(pump->ssl, pump->network) != 1) {
        ERR_clear_error();
        return ENOMEM;
    }
    SSL_set_accept_state(pump->ssl);
    pthread_mutex_lock(&tls->lock);
    pump->next = tls->pumps;
    int error = start_thread(pump);
    if (error == 0) {
        if (pump->next != NULL) {
            pump->next->previous = pump;
        }
        tls->pumps = pump;
    }
    pthread_mutex_unlock(&tls->lock);
    return error;
}

int tapfs_tls_begin(tapfs_tls *tls, int fd)
{
    int pair[2];
    struct pump *pump = calloc(1, sizeof *pump);

    if (pump == NULL) {
        return -ENOMEM;
    }
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0) {
        int error = errno;
        free(pump);
        return -error;
    }
    pump->tls = tls;
    pump->network = fd;
    pump->plain = pair[0];
    int error = begin(pump);
    if (error != 0) {
        SSL_free(pump->ssl);
        close(pair[0]);
        close(pair[1]);
        free(pump);
        return -error;
    }
    return pair[1];
}

void tapfs_tls_why(tapfs_tls *tls, char *text, size_t capacity)
{
    pthread_mutex_lock(&tls->lock);
    size_t length = minimum(strlen(tls->why), capacity - 1);
    memcpy(text, tls->why, length);
    text[length] = 0;
    tls->why[0] = 0;
    pthread_mutex_unlock(&tls->lock);
}

/* ---- keys and certificates */

static unsigned find_key(SSL *ssl, const char *identity, unsigned char *key, unsigned capacity)
{
    const tapfs_tls *tls = SSL_CTX_get_app_data(SSL_get_SSL_CTX(ssl));

    for (size_t i = 0; i < tls->key_count; i++) {
        const struct shared_key *known = &tls->keys[i];
        if (strcmp(known->identity, identity) == 0 && known->length <= capacity) {
            memcpy(key, known->bytes, known->length);
            return known->length;
        }
    }
    return 0;
}

int tapfs_tls_add_key(tapfs_tls *tls, const char *identity, const uint8_t *key, size_t length)
{
    if (strlen(identity) >= IDENTITY_MAX || length == 0 || length > TAPFS_TLS_KEY_MAX || tls->key_count == KEYS_MAX) {
        return -EINVAL;
    }
    struct shared_key *keys = realloc(tls->keys, (tls->key_count + 1) * sizeof *keys);
    if (keys == NULL) {
        return -ENOMEM;
    }
    tls->keys = keys;
    struct shared_key *added = &keys[tls->key_count++];
    *added = (struct shared_key){.length = (uint32_t)length};
    memcpy(added->identity, identity, strlen(identity));
    memcpy(added->bytes, key, length);
    SSL_CTX_set_psk_server_callback(tls->context, find_key);
    return 0;
}

int tapfs_tls_use_certificate(tapfs_tls *tls, const char *certificate, const char *key, const char *authority,
                              int verify)
{
    bool good = SSL_CTX_use_certificate_chain_file(tls->context, certificate) == 1 &&
                SSL_CTX_use_PrivateKey_file(tls->context, key, SSL_FILETYPE_PEM) == 1 &&
                SSL_CTX_check_private_key(tls->context) == 1;
    if (good && verify) {
        good = SSL_CTX_load_verify_locations(tls->context, authority, NULL) == 1;
        SSL_CTX_set_verify(tls->context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    }
    if (!good) {
        note_failure(tls);
        return -EINVAL;
    }
    return 0;
}

tapfs_tls *tapfs_tls_new(void)
{
    tapfs_tls *tls = calloc(1, sizeof *tls);
    if (tls == NULL) {
        return NULL;
    }
    tls->context = SSL_CTX_new(TLS_server_method());
    if (tls->context == NULL) {
        free(tls);
        return NULL;
    }
    pthread_mutex_init(&tls->lock, NULL);
    pthread_cond_init(&tls->ended, NULL);
    SSL_CTX_set_app_data(tls->context, tls);
    SSL_CTX_set_min_proto_version(tls->context, TLS1_2_VERSION);
    SSL_CTX_set_options(tls->context, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_IGNORE_UNEXPECTED_EOF);
    SSL_CTX_set_num_tickets(tls->context, 0);
    SSL_CTX_set_session_cache_mode(tls->context, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_mode(tls->context, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    return tls;
}

void tapfs_tls_free(tapfs_tls *tls)
{
    struct timespec end;

    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += END_SECONDS;
    pthread_mutex_lock(&tls->lock);
    while (tls->pumps != NULL && pthread_cond_timedwait(&tls->ended, &tls->lock, &end) == 0) {
    }
    for (struct pump *pump = tls->pumps; pump != NULL; pump = pump->next) {
        shutdown(pump->network, SHUT_RDWR);
        shutdown(pump->plain, SHUT_RDWR);
    }
    while (tls->pumps != NULL) {
        pthread_cond_wait(&tls->ended, &tls->lock);
    }
    pthread_mutex_unlock(&tls->lock);
    SSL_CTX_free(tls->context);
    for (size_t i = 0; i < tls->key_count; i++) {
        explicit_bzero(&tls->keys[i], sizeof tls->keys[i]);
    }
    free(tls->keys);
    pthread_cond_destroy(&tls->ended);
    pthread_mutex_destroy(&tls->lock);
    free(tls);
}
