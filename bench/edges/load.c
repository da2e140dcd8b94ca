/* Load that costs next to nothing and does not wait for slow answers.
 *
 *   load HOST:PORT CONNECTIONS RATE SECONDS BODY_FILE [HEADER…]
 *
 * POSTs the body to /v1/chat/completions over CONNECTIONS kept connections. RATE 0: closed loop,
 * each connection asks again as soon as it is answered. RATE > 0: open loop, RATE requests are due
 * each second whether or not the earlier ones are answered; a request's latency counts from when
 * it was due, so that a stalled server cannot hide (no coordinated omission); those due while the
 * connections are new are not timed. What is under way at the end is finished. Prints one line of
 * JSON.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define HEAD 8192
#define READ (1 << 16)
#define SAMPLES_MAX (1 << 23)
#define DRAIN_NS 20000000000ull
#define NEW_NS 250000000ull

struct conn {
    int fd;
    int busy;
    int in_head;
    int chunked;
    long left;       /* of a body of known length */
    size_t have;     /* of the head */
    uint64_t due_ns; /* when this request should have been sent */
    int first;       /* its first body byte has come */
    char tail[4];    /* of a chunked body */
    char head[HEAD];
};

static struct conn *conns;
static int *idle;
static int idles, epoll_fd, count, rate;
static char *request;
static size_t request_bytes;
static struct sockaddr_in where;
static uint32_t *first_us, *whole_us;
static uint64_t timed_ns; /* from when on a due request is timed */
static size_t begun, done, timed, errors, bad_status, body_bytes;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void open_conn(int i) {
    struct conn *c = &conns[i];
    int on = 1;
    memset(c, 0, sizeof *c);
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&where, sizeof where)) die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = (uint32_t)i};
    if (epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event)) die("epoll_ctl");
    idle[idles++] = i;
}

static void fail(int i) {
    errors++;
    close(conns[i].fd);
    open_conn(i);
}

static void send_on(int i, uint64_t due_ns) {
    struct conn *c = &conns[i];
    c->busy = 1, c->in_head = 1, c->have = 0, c->first = 0, c->due_ns = due_ns;
    memset(c->tail, 0, sizeof c->tail);
    if (write(c->fd, request, request_bytes) != (ssize_t)request_bytes) fail(i);
}

static void answered(int i, uint64_t at_ns) {
    struct conn *c = &conns[i];
    if (c->due_ns >= timed_ns && timed < SAMPLES_MAX) whole_us[timed++] = (uint32_t)((at_ns - c->due_ns) / 1000);
    done++;
    c->busy = 0;
    idle[idles++] = i;
}

static void take_body(int i, const char *data, size_t bytes, uint64_t at_ns) {
    struct conn *c = &conns[i];
    if (bytes && !c->first) {
        c->first = 1;
        if (c->due_ns >= timed_ns && begun < SAMPLES_MAX)
            first_us[begun++] = (uint32_t)((at_ns - c->due_ns) / 1000);
    }
    body_bytes += bytes;
    if (!c->chunked) {
        c->left -= (long)bytes;
        if (c->left <= 0) answered(i, at_ns);
        return;
    }
    /* An event ends with an LF before its chunk's CRLF: only the last chunk ends like this. */
    if (bytes >= 4) memcpy(c->tail, data + bytes - 4, 4);
    else {
        memmove(c->tail, c->tail + bytes, 4 - bytes);
        memcpy(c->tail + 4 - bytes, data, bytes);
    }
    if (!memcmp(c->tail, "\r\n\r\n", 4)) answered(i, at_ns);
}

static void take(int i, uint64_t at_ns) {
    static char buffer[READ];
    struct conn *c = &conns[i];
    ssize_t bytes = read(c->fd, buffer, sizeof buffer);
    if (bytes <= 0) {
        if (bytes < 0 && (errno == EAGAIN || errno == EINTR)) return;
        if (c->busy) fail(i);
        else {
            /* Closed while idle: its place in the stack is taken by the fresh one. */
            for (int k = 0; k < idles; k++)
                if (idle[k] == i) idle[k] = idle[--idles];
            close(c->fd);
            open_conn(i);
        }
        return;
    }
    if (!c->in_head) return take_body(i, buffer, (size_t)bytes, at_ns);
    if (c->have + (size_t)bytes >= HEAD) {
        /* Only the head has to fit; what follows it is taken from the buffer. */
        size_t room = HEAD - 1 - c->have;
        memcpy(c->head + c->have, buffer, room);
        c->head[HEAD - 1] = 0;
    } else {
        memcpy(c->head + c->have, buffer, (size_t)bytes);
        c->head[c->have + (size_t)bytes] = 0;
    }
    char *end = strstr(c->head, "\r\n\r\n");
    if (!end) {
        c->have += (size_t)bytes;
        return;
    }
    size_t head_bytes = (size_t)(end - c->head) + 4, old = c->have;
    *end = 0;
    if (strncmp(c->head + 9, "200", 3)) bad_status++;
    char *length = strcasestr(c->head, "\r\ncontent-length:");
    c->chunked = !length;
    c->left = length ? atol(length + 17) : 0;
    c->in_head = 0;
    take_body(i, buffer + (head_bytes - old), (size_t)bytes - (head_bytes - old), at_ns);
}

static int by_value(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

static uint32_t at(const uint32_t *sorted, size_t n, double share) {
    return n ? sorted[(size_t)((double)(n - 1) * share)] : 0;
}

static void build_request(const char *host, const char *path, int headers, char **header) {
    FILE *file = fopen(path, "rb");
    if (!file) die(path);
    static char body[1 << 20];
    size_t bytes = fread(body, 1, sizeof body, file);
    fclose(file);
    request = malloc(bytes + HEAD);
    int n = sprintf(request, "POST /v1/chat/completions HTTP/1.1\r\nHost: %s\r\n"
                    "Content-Type: application/json\r\nContent-Length: %zu\r\n", host, bytes);
    for (int i = 0; i < headers; i++) n += sprintf(request + n, "%s\r\n", header[i]);
    n += sprintf(request + n, "\r\n");
    memcpy(request + n, body, bytes);
    request_bytes = (size_t)n + bytes;
}

int main(int argc, char **argv) {
    if (argc < 6) return fprintf(stderr, "load HOST:PORT CONNECTIONS RATE SECONDS BODY\n"), 2;
    signal(SIGPIPE, SIG_IGN);
    char *host = argv[1], *colon = strrchr(host, ':');
    double seconds = atof(argv[4]);
    count = atoi(argv[2]), rate = atoi(argv[3]);
    build_request(host, argv[5], argc - 6, argv + 6);
    *colon = 0;
    where.sin_family = AF_INET;
    where.sin_port = htons((uint16_t)atoi(colon + 1));
    inet_pton(AF_INET, host, &where.sin_addr);
    conns = calloc((size_t)count, sizeof *conns);
    idle = calloc((size_t)count, sizeof *idle);
    first_us = malloc(SAMPLES_MAX * sizeof *first_us);
    whole_us = malloc(SAMPLES_MAX * sizeof *whole_us);
    epoll_fd = epoll_create1(0);
    for (int i = 0; i < count; i++) open_conn(i);

    uint64_t start = now_ns(), end = start + (uint64_t)(seconds * 1e9), at_ns = start, sent = 0;
    struct epoll_event events[256];
    if (rate) timed_ns = start + NEW_NS;
    while (at_ns < end || idles < count) {
        while (idles && at_ns < end) {
            uint64_t due = rate ? start + sent * 1000000000ull / (uint64_t)rate : at_ns;
            if (due > at_ns) break;
            int i = idle[--idles];
            sent++;
            send_on(i, due);
        }
        if (at_ns > end + DRAIN_NS) break;
        int timeout = 50;
        if (rate && idles && at_ns < end) {
            uint64_t due = start + sent * 1000000000ull / (uint64_t)rate;
            timeout = due > at_ns + 1000000 ? (int)((due - at_ns) / 1000000) : 0;
        }
        int n = epoll_wait(epoll_fd, events, 256, timeout);
        at_ns = now_ns();
        for (int k = 0; k < n; k++) take((int)events[k].data.u32, at_ns);
        if (!n && !timeout) {
            struct timespec nap = {0, 50000}; /* to be on time within 50 us costs no busy core */
            nanosleep(&nap, NULL);
            at_ns = now_ns();
        }
    }
    qsort(first_us, begun, sizeof *first_us, by_value);
    qsort(whole_us, timed, sizeof *whole_us, by_value);
    printf("{\"requests\": %zu, \"seconds\": %.3f, \"errors\": %zu, \"bad_status\": %zu, "
           "\"unfinished\": %d, \"body_bytes\": %zu, \"first_p50_us\": %u, \"first_p99_us\": %u, "
           "\"p50_us\": %u, \"p99_us\": %u, \"max_us\": %u}\n",
           done, (double)(now_ns() - start) / 1e9, errors, bad_status, count - idles, body_bytes,
           at(first_us, begun, .5), at(first_us, begun, .99), at(whole_us, timed, .5),
           at(whole_us, timed, .99), at(whole_us, timed, 1));
    return 0;
}
