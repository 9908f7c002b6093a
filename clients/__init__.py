"""The client side: local training and Flower's ClientApp."""

if not __name__.startswith("fedlora."):
    raise ImportError(f"import this folder as fedlora.{__name__}, not as {__name__}")
