"""Replicas of a model on a Ray cluster: batches over a dataset, and a service."""

try:
    import ray  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "jaxengine.on_ray needs Ray, which is an extra: pip install 'jaxengine[ray]'"
    ) from error
