"""Customer service: the tasks `customer_service` and `customer_replies`."""
