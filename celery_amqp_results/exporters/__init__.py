"""The backend's metrics for Prometheus and OpenTelemetry.

Each module needs the extra of the same name.
"""
