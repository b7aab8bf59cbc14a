"""What the functions of ``util.state`` raise."""


class RayStateApiException(Exception):
    """A question that cannot be answered as it was put."""

    def __init__(self, err_msg: str, *args: object):
        super().__init__(err_msg, *args)


class DataSourceUnavailable(Exception):
    """Who would know did not answer."""


class ServerUnavailable(RayStateApiException):
    """There is nobody to ask."""
