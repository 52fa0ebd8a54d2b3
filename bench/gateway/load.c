/* A closed-loop HTTP/1.1 load generator for streamed answers: --clients connections, each asks again as soon as its
 * answer has ended. Unlike wrk it measures the time to the first event and speaks to Unix sockets. Linux.
 *
 *   load (--uds PATH | --port N) [--clients 1] [--seconds 5] [--warm-up 1] [--events 66] [--max-tokens 65]
 *
 * Prints one JSON object; "with_warm_up" counts all answers, the other figures leave the warm-up out;
 * "events" counts those of unfinished answers too. An answer counts as wrong if its status is not 200 or it has fewer than --events events
 * (LiteLLM adds some). Times are in microseconds: "first_event_us" from the request's write to the first whole event,
 * "answer_us" to the answer's end.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CLIENTS = 1024, MAX_SAMPLES = 1 << 22 };

struct client {
    int fd, events;
    char status[16], tail[8]; /* the answer's first bytes; its last bytes */
    size_t got;
    char last;
    double asked;
};

static const char *uds;
static int port, wanted_events = 66;
static struct client clients[MAX_CLIENTS];
static float *first, *whole;
static size_t n_first, n_whole;
static char request[4096];
static size_t request_len;
static double measure_from;
static long n_events, n_wrong, n_all;

static double now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void ask(struct client *c) {
    c->events = 0;
    c->got = 0;
    c->last = 0;
    memset(c->tail, 0, sizeof c->tail);
    c->asked = now_us();
    if (send(c->fd, request, request_len, MSG_NOSIGNAL) != (ssize_t)request_len) die("send");
}

static void dial(struct client *c, int poll) {
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    int one = 1;
    in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (uds) snprintf(un.sun_path, sizeof un.sun_path, "%s", uds);
    c->fd = socket(uds ? AF_UNIX : AF_INET, SOCK_STREAM, 0);
    if (connect(c->fd, uds ? (struct sockaddr *)&un : (struct sockaddr *)&in, uds ? sizeof un : sizeof in))
        die("connect");
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event interest = {.events = EPOLLIN, .data.ptr = c};
    if (epoll_ctl(poll, EPOLL_CTL_ADD, c->fd, &interest)) die("epoll_ctl");
}

/* Take bytes of an answer; 1 when it has ended. Server-sent events hold no CR, so the last chunk's mark is unique. */
static int take(struct client *c, const char *data, size_t n, double now) {
    for (size_t i = 0; i < n && c->got + i < sizeof c->status - 1; i++) c->status[c->got + i] = data[i];
    int before = c->events;
    for (size_t i = 0; i < n; i++) {
        if (data[i] == '\n' && c->last == '\n') c->events++; /* the head's empty line is CR LF CR LF */
        c->last = data[i];
    }
    if (now >= measure_from) n_events += c->events - before;
    if (!before && c->events && now >= measure_from && n_first < MAX_SAMPLES) first[n_first++] = (float)(now - c->asked);
    c->got += n;
    for (size_t i = n > 7 ? n - 7 : 0; i < n; i++) {
        memmove(c->tail, c->tail + 1, 6);
        c->tail[6] = data[i];
    }
    return !memcmp(c->tail, "\r\n0\r\n\r\n", 7);
}

static int by_size(const void *a, const void *b) {
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static float quantile(float *sorted, size_t n, double q) { return n ? sorted[(size_t)((double)(n - 1) * q)] : 0; }

int main(int argc, char **argv) {
    int n_clients = 1, max_tokens = 65;
    double seconds = 5, warm_up = 1;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--uds")) uds = argv[i + 1];
        else if (!strcmp(argv[i], "--port")) port = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--clients")) n_clients = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--seconds")) seconds = atof(argv[i + 1]);
        else if (!strcmp(argv[i], "--warm-up")) warm_up = atof(argv[i + 1]);
        else if (!strcmp(argv[i], "--events")) wanted_events = atoi(argv[i + 1]);
        else if (!strcmp(argv[i], "--max-tokens")) max_tokens = atoi(argv[i + 1]);
        else argc = 0;
    }
    if ((!uds && !port) || n_clients < 1 || n_clients > MAX_CLIENTS) {
        fprintf(stderr, "usage: load (--uds PATH | --port N) [--clients 1] [--seconds 5] [--warm-up 1] "
                        "[--events 66] [--max-tokens 65]\n");
        return 2;
    }
    char body[1024];
    int body_len = snprintf(body, sizeof body,
                            "{\"model\":\"default\",\"messages\":[{\"role\":\"user\",\"content\":\"Say something.\"}],"
                            "\"stream\":true,\"max_tokens\":%d,\"temperature\":0,\"ignore_eos\":true}", max_tokens);
    request_len = (size_t)snprintf(request, sizeof request,
                                   "POST /v1/chat/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json"
                                   "\r\naccept: */*\r\nuser-agent: load/1\r\ncontent-length: %d\r\n\r\n%s",
                                   body_len, body);
    first = malloc(sizeof *first * MAX_SAMPLES);
    whole = malloc(sizeof *whole * MAX_SAMPLES);
    signal(SIGPIPE, SIG_IGN);
    int poll = epoll_create1(0);
    double start = now_us(), stop = start + (warm_up + seconds) * 1e6;
    measure_from = start + warm_up * 1e6;
    for (int i = 0; i < n_clients; i++) dial(&clients[i], poll), ask(&clients[i]);
    static char data[1 << 18];
    struct epoll_event events[MAX_CLIENTS];
    for (;;) {
        int n = epoll_wait(poll, events, MAX_CLIENTS, 100);
        double now = now_us();
        if (now >= stop) break;
        for (int i = 0; i < n; i++) {
            struct client *c = events[i].data.ptr;
            ssize_t got = recv(c->fd, data, sizeof data, MSG_DONTWAIT);
            if (got < 0 && errno == EAGAIN) continue;
            if (got <= 0) {
                fprintf(stderr, "the server closed a connection after %zu bytes of an answer\n", c->got);
                n_wrong++;
                close(c->fd);
                dial(c, poll);
                ask(c);
                continue;
            }
            if (!take(c, data, (size_t)got, now)) continue;
            n_all++;
            if (now >= measure_from) {
                if (strncmp(c->status, "HTTP/1.1 200", 12) || c->events < wanted_events) n_wrong++;
                if (n_whole < MAX_SAMPLES) whole[n_whole++] = (float)(now - c->asked);
            }
            ask(c);
        }
    }
    qsort(first, n_first, sizeof *first, by_size);
    qsort(whole, n_whole, sizeof *whole, by_size);
    printf("{\"answers\": %zu, \"with_warm_up\": %ld, \"wrong\": %ld, \"events\": %ld, \"seconds\": %.6f, "
           "\"first_event_us\": {\"p50\": %.1f, \"p90\": %.1f, \"p99\": %.1f}, "
           "\"answer_us\": {\"p50\": %.1f, \"p90\": %.1f, \"p99\": %.1f}}\n",
           n_whole, n_all, n_wrong, n_events, seconds, quantile(first, n_first, .5), quantile(first, n_first, .9),
           quantile(first, n_first, .99), quantile(whole, n_whole, .5), quantile(whole, n_whole, .9),
           quantile(whole, n_whole, .99));
    return n_wrong > 0;
}
