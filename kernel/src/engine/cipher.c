/* Ciphers of guest data, sector by sector: AES in CBC or XTS mode, the IV made of the number of the sector. */
#include <endian.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

#include "engine/internal.h"

#define IDLE_MAX 8
#define IV_BYTES 16

/* The key schedules of one direction, and of the cipher that encrypts IVs, if there is one. */
struct schedule {
    EVP_CIPHER_CTX *data, *iv;
};

/* Idle schedules, by direction. */
struct cipher {
    pthread_mutex_t mutex;
    EVP_CIPHER *algorithm, *iv_algorithm;
    struct schedule idle[2][IDLE_MAX];
    size_t idle_count[2];
    tapfs_cipher spec;
    uint8_t iv_key[32]; /* ESSIV: SHA-256 of the key */
};

static const char *name_of(const tapfs_cipher *spec)
{
    switch (spec->algorithm) {
    case TAPFS_CIPHER_AES_CBC_PLAIN64:
    case TAPFS_CIPHER_AES_CBC_ESSIV_SHA256:
        return spec->key_bytes == 16   ? "AES-128-CBC"
               : spec->key_bytes == 24 ? "AES-192-CBC"
               : spec->key_bytes == 32 ? "AES-256-CBC"
                                       : NULL;
    case TAPFS_CIPHER_AES_XTS_PLAIN64:
        return spec->key_bytes == 32 ? "AES-128-XTS" : spec->key_bytes == 64 ? "AES-256-XTS" : NULL;
    default:
        return NULL;
    }
}

bool cipher_valid(const tapfs_cipher *spec)
{
    bool power = (spec->sector_bytes & (spec->sector_bytes - 1)) == 0;
    return name_of(spec) != NULL && spec->sector_bytes >= CIPHER_SECTOR_MIN &&
           spec->sector_bytes <= CIPHER_SECTOR_MAX && power && spec->iv_bytes > 0 &&
           spec->sector_bytes % spec->iv_bytes == 0 && spec->iv_offset % spec->sector_bytes == 0;
}

struct cipher *cipher_new(const tapfs_cipher *spec)
{
    struct cipher *cipher = calloc(1, sizeof *cipher);
    if (cipher == NULL) {
        return NULL;
    }
    pthread_mutex_init(&cipher->mutex, NULL);
    cipher->spec = *spec;
    cipher->algorithm = EVP_CIPHER_fetch(NULL, name_of(spec), NULL);
    bool ready = cipher->algorithm != NULL;
    if (ready && spec->algorithm == TAPFS_CIPHER_AES_CBC_ESSIV_SHA256) {
        cipher->iv_algorithm = EVP_CIPHER_fetch(NULL, "AES-256-ECB", NULL);
        ready = cipher->iv_algorithm != NULL &&
                EVP_Q_digest(NULL, "SHA256", NULL, spec->key, spec->key_bytes, cipher->iv_key, NULL) == 1;
    }
    if (!ready) {
        cipher_free(cipher);
        return NULL;
    }
    return cipher;
}

static void schedule_free(struct schedule *schedule)
{
    EVP_CIPHER_CTX_free(schedule->data);
    EVP_CIPHER_CTX_free(schedule->iv);
    *schedule = (struct schedule){.data = NULL};
}

void cipher_free(struct cipher *cipher)
{
    if (cipher == NULL) {
        return;
    }
    for (size_t direction = 0; direction < 2; direction++) {
        while (cipher->idle_count[direction] > 0) {
            schedule_free(&cipher->idle[direction][--cipher->idle_count[direction]]);
        }
    }
    EVP_CIPHER_free(cipher->algorithm);
    EVP_CIPHER_free(cipher->iv_algorithm);
    pthread_mutex_destroy(&cipher->mutex);
    OPENSSL_cleanse(&cipher->spec, sizeof cipher->spec);
    OPENSSL_cleanse(cipher->iv_key, sizeof cipher->iv_key);
    free(cipher);
}

static EVP_CIPHER_CTX *keyed(const EVP_CIPHER *algorithm, const uint8_t *key, bool encrypt)
{
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    if (context != NULL && (EVP_CipherInit_ex2(context, algorithm, key, NULL, encrypt, NULL) != 1 ||
                            EVP_CIPHER_CTX_set_padding(context, 0) != 1)) {
        EVP_CIPHER_CTX_free(context);
        context = NULL;
    }
    return context;
}

static bool take(struct cipher *cipher, bool encrypt, struct schedule *schedule)
{
    bool found = false;

    pthread_mutex_lock(&cipher->mutex);
    if (cipher->idle_count[encrypt] > 0) {
        *schedule = cipher->idle[encrypt][--cipher->idle_count[encrypt]];
        found = true;
    }
    pthread_mutex_unlock(&cipher->mutex);
    if (found) {
        return true;
    }
    schedule->data = keyed(cipher->algorithm, cipher->spec.key, encrypt);
    schedule->iv = cipher->iv_algorithm == NULL ? NULL : keyed(cipher->iv_algorithm, cipher->iv_key, true);
    if (schedule->data == NULL || (cipher->iv_algorithm != NULL && schedule->iv == NULL)) {
        schedule_free(schedule);
        return false;
    }
    return true;
}

static void give_back(struct cipher *cipher, bool encrypt, struct schedule *schedule)
{
    pthread_mutex_lock(&cipher->mutex);
    if (cipher->idle_count[encrypt] < IDLE_MAX) {
        cipher->idle[encrypt][cipher->idle_count[encrypt]++] = *schedule;
        *schedule = (struct schedule){.data = NULL};
    }
    pthread_mutex_unlock(&cipher->mutex);
    schedule_free(schedule);
}

static bool apply_sector(const struct schedule *schedule, bool encrypt, uint8_t *sector, uint32_t bytes,
                         uint64_t number)
{
    uint64_t words[IV_BYTES / sizeof(uint64_t)] = {htole64(number), 0};
    uint8_t vector[IV_BYTES];
    int count = 0;

    memcpy(vector, words, sizeof vector);
    if (schedule->iv != NULL &&
        (EVP_CipherUpdate(schedule->iv, vector, &count, (const uint8_t *)words, IV_BYTES) != 1 || count != IV_BYTES)) {
        return false;
    }
    return EVP_CipherInit_ex2(schedule->data, NULL, NULL, vector, encrypt, NULL) == 1 &&
           EVP_CipherUpdate(schedule->data, sector, &count, sector, (int)bytes) == 1 && count == (int)bytes;
}

int cipher_apply(struct cipher *cipher, bool encrypt, uint8_t *buffer, uint64_t guest, uint64_t host, uint64_t length)
{
    const tapfs_cipher *spec = &cipher->spec;
    uint64_t at = (spec->iv_from_host ? host : guest) - spec->iv_offset;
    struct schedule schedule;

    if (!take(cipher, encrypt, &schedule)) {
        return ENOMEM;
    }
    for (uint64_t done = 0; done < length; done += spec->sector_bytes) {
        if (!apply_sector(&schedule, encrypt, buffer + done, spec->sector_bytes, (at + done) / spec->iv_bytes)) {
            schedule_free(&schedule);
            return EIO;
        }
    }
    give_back(cipher, encrypt, &schedule);
    return 0;
}
