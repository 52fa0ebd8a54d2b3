"""The gateway's own counters, in the Prometheus text format beside the engine's."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from spark_llm.status import State, Status


class Metrics:
    """``spark_llm_*``; a registry of its own, so that two gateways in one process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "spark_llm_requests",
            "Requests by path, status and reason code",
            ("path", "status", "reason"),
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "spark_llm_time_to_first_byte_seconds",
            "From the end of the request's body to the first byte of the answer",
            buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120),
            registry=self.registry,
        )
        self.disconnects = Counter(
            "spark_llm_client_disconnects",
            "Clients that left before the end of their answer",
            registry=self.registry,
        )
        self.running = Gauge(
            "spark_llm_requests_running", "Requests at the engine", registry=self.registry
        )
        self.waiting = Gauge(
            "spark_llm_requests_waiting", "Requests in the queue", registry=self.registry
        )
        self.state = Gauge(
            "spark_llm_state", "1 for the state it is in", ("state",), registry=self.registry
        )
        self.restarts = Gauge(
            "spark_llm_engine_restarts", "Engine restarts in the window", registry=self.registry
        )

        self.memory = Gauge(
            "spark_llm_engine_memory_bytes",
            "What the engine holds of the machine's memory; 0 if unknown",
            registry=self.registry,
        )
        self.memory_peak = Gauge(
            "spark_llm_engine_memory_peak_bytes",
            "The most it has held in this run",
            registry=self.registry,
        )

    def text(self, status: Status, *, running: int, waiting: int) -> bytes:
        """One scrape.

        Args:
            status: of the first model.
            running: requests at all engines.
            waiting: requests in all queues.
        """
        for known in State:
            self.state.labels(known).set(known is status.state)
        self.running.set(running)
        self.waiting.set(waiting)
        self.restarts.set(status.restarts)
        self.memory.set(status.memory_bytes)
        self.memory_peak.set(status.memory_peak_bytes)
        return generate_latest(self.registry)
