from django.urls import path
from orders import views

urlpatterns = [
    path("orders/", views.place_order),
    path("orders/<uuid:order_id>/", views.show_order),
    path("orders/<uuid:order_id>/cancel/", views.cancel_order),
]
